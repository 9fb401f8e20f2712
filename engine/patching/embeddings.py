"""Rows of embedding and head for a patched vocabulary, from the old rows and the converter: patched_matrix().

It knows rows, weights and the three stored number formats; it knows neither files, nor tokens' texts, nor why a
new id stands for the old ids it is given. numpy only: bfloat16 travels as its 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.core.errors import LoadError
from engine.loading.gguf import to_bfloat16

Method = Literal["exp", "mean"]
Side = Literal["input", "output"]
METHODS: tuple[Method, ...] = get_args(Method)
SIDES: tuple[Side, ...] = get_args(Side)

NUMPY_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
"""How a matrix stored in a safetensors dtype is held here."""

BLOCK_BYTES = 64 << 20
"""Widened rows held at a time."""


def row_weights(count: int, method: Method, side: Side) -> npt.NDArray[np.float64]:
    """Weights [count] of the old rows of one new token, in reading order; they sum to 1.

    exp: each old row weighs twice (input: the last is heaviest) or half (output: the first is heaviest) its
    predecessor, 2**i / (2**count - 1). mean: 1 / count on both sides. One old row weighs exactly 1.
    Raises ValueError for a count below 1 or an unknown method or side.
    Source: AdaptiVocab's released code; its paper writes e**(2i), which is not what was trained.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1: a token without old ids has no row")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; known: {', '.join(METHODS)}")
    if side not in SIDES:
        raise ValueError(f"side={side!r} is unknown; known: {', '.join(SIDES)}")
    if method == "mean":
        return np.full(count, 1.0 / count)
    rising = np.exp2(np.arange(count, dtype=np.float64) - count)  # scaled, so that a long token cannot overflow
    rising /= rising.sum()
    return rising if side == "input" else rising[::-1].copy()


def widen(stored: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    """Values as float32, exactly. stored: as NUMPY_DTYPES says for dtype (F32, F16, BF16), any shape."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """float32 values rounded to nearest even into dtype's stored form; NaN stays NaN."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype])
    return to_bfloat16(values)


def combine(rows: npt.NDArray[np.generic], dtype: str, method: Method, side: Side) -> npt.NDArray[np.generic]:
    """New rows [M, C] from M groups of n old rows [M, n, C], both in dtype's stored form.

    The arithmetic is that of the stored dtype, as the released code's: for exp, weights and products are rounded
    to it and the sum, taken in float32, is rounded once; for mean the sum and its division are float32 and the
    quotient is rounded. For float32 nothing is rounded in between.
    """
    count = rows.shape[1]
    wide = widen(rows, dtype)
    if count == 1:
        return rows[:, 0]
    if method == "mean":
        return narrow(wide.sum(axis=1, dtype=np.float32) / np.float32(count), dtype)
    weights = row_weights(count, method, side).astype(np.float32)
    wide *= widen(narrow(weights, dtype), dtype)[None, :, None]
    return narrow(widen(narrow(wide, dtype), dtype).sum(axis=1, dtype=np.float32), dtype)


def patched_matrix(matrix: npt.NDArray[np.generic], dtype: str, old_ids: Sequence[Sequence[int]], method: Method,
                   side: Side) -> npt.NDArray[np.generic]:
    """The matrix [V_new, C] (or bias [V_new]) of the patched vocabulary, in the dtype of the old one.

    matrix: [R, C] or [R], R >= the base vocabulary; rows that no new id stands for (removed tokens, padding) are
    not carried over. dtype: F32, F16 or BF16 (bits as uint16). old_ids[new id]: the base ids it stands for; a
    single one is copied bit by bit, several are combined.
    Raises LoadError for a dtype that rows cannot be computed in and for an old id without a row.
    """
    if dtype not in NUMPY_DTYPES:
        raise LoadError(f"embedding rows are stored as {dtype}; rows of n-grams can be computed in "
                        f"{', '.join(NUMPY_DTYPES)}")
    if matrix.dtype != NUMPY_DTYPES[dtype]:
        raise ValueError(f"a {dtype} matrix is held as {NUMPY_DTYPES[dtype]}, not as {matrix.dtype}")
    flat = matrix.reshape(matrix.shape[0], -1)
    by_count = _by_count(old_ids, flat.shape[0])
    result = np.empty((len(old_ids), flat.shape[1]), flat.dtype)
    for count, (new, old) in by_count.items():
        block = max(1, BLOCK_BYTES // (4 * count * max(1, flat.shape[1])))
        for start in range(0, len(new), block):
            part = slice(start, start + block)
            result[new[part]] = combine(flat[old[part]], dtype, method, side)
    return result.reshape(len(old_ids), *matrix.shape[1:])


def _by_count(old_ids: Sequence[Sequence[int]],
              rows: int) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Number of old ids -> (new ids [M], their old ids [M, number])."""
    groups: dict[int, tuple[list[int], list[Sequence[int]]]] = {}
    for new, old in enumerate(old_ids):
        if not old:
            raise LoadError(f"new id {new} stands for no base id, so it has no row; the artefact is damaged")
        news, olds = groups.setdefault(len(old), ([], []))
        news.append(new)
        olds.append(old)
    arrays = {count: (np.array(new, np.int64), np.array(old, np.int64)) for count, (new, old) in groups.items()}
    for new_array, old_array in arrays.values():
        bad = ((old_array < 0) | (old_array >= rows)).any(axis=1)
        if bad.any():
            at = int(bad.argmax())
            raise LoadError(f"new id {new_array[at]} stands for base ids {old_array[at].tolist()}, but the model has "
                            f"rows 0..{rows - 1} only; artefact and model do not belong together")
    return arrays
