"""Words and shuffles drawn from a key for many labels at once, in C++: what engine/scx/keys.py defines and also does.

It knows bytes and counts: HKDF-Expand of a text that names the label, ChaCha20's words, Fisher and Yates. Where the
extension is not built, or the CPU has none of its instruction sets, available() is False and that module does it alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tessera_kernels.checks import require
from tessera_kernels.native import OPS

KEY_BYTES = 32


class Text(NamedTuple):
    """What HKDF expands: info, in which 12 bytes from place_at are a label's segment, layer and head, big-endian."""

    info: bytes
    place_at: int


def available() -> bool:
    """Whether C++ draws here."""
    return torch.float32 in OPS


def shuffles(
    key: bytearray, text: Text, labels: np.ndarray, orders: np.ndarray, inverses: np.ndarray | None = None
) -> None:
    """An unbiased shuffle of 0..size-1 for each label into orders (R, size) int16, what undoes it into inverses.

    labels: (R, 3) uint32: layer, head, segment. Raises ValueError for a wrong shape or dtype; size: 2..2**15.
    """
    for given in (orders,) if inverses is None else (orders, inverses):
        require(given.dtype == np.int16 and given.shape == orders.shape and given.flags.c_contiguous,
                "orders are %s %s; want (R, size) int16 contiguous", given.shape, given.dtype)  # fmt: skip
    _draw(key, text, labels, orders.shape, orders.ctypes.data, 0 if inverses is None else inverses.ctypes.data)


def words(key: bytearray, text: Text, labels: np.ndarray, into: np.ndarray) -> None:
    """The first words of each label's stream into (R, count) uint32. labels and errors as for shuffles()."""
    require(into.dtype == np.uint32 and into.flags.c_contiguous, "words are %s; want (R, count) uint32 contiguous",
            into.dtype)  # fmt: skip
    _draw(key, text, labels, into.shape, words=into.ctypes.data)


def signs(key: bytearray, text: Text, labels: np.ndarray, into: np.ndarray) -> None:
    """1 or -1 by the first bit of each word, into (2, R, D) int16: the first and the second D words of each label."""
    require(into.dtype == np.int16 and into.ndim == 3 and into.shape[0] == 2 and into.flags.c_contiguous,
            "signs are %s %s; want (2, R, D) int16 contiguous", into.shape, into.dtype)  # fmt: skip
    _draw(key, text, labels, (into.shape[1], 2 * into.shape[2]), signs=into.ctypes.data)


def _draw(
    key: bytearray, text: Text, labels: np.ndarray, shape: tuple[int, ...], orders: int = 0, inverses: int = 0,
    words: int = 0, signs: int = 0,
) -> None:  # fmt: skip
    require(labels.dtype == np.uint32 and labels.flags.c_contiguous and labels.shape == (shape[0], 3),
            "labels are %s %s; want (%d, 3) uint32 contiguous", labels.shape, labels.dtype, shape[0])  # fmt: skip
    require(len(key) == KEY_BYTES, "a key has %d bytes; want %d", len(key), KEY_BYTES)
    if not shape[0]:
        return
    info = np.frombuffer(text.info, dtype=np.uint8)
    secret = np.frombuffer(key, dtype=np.uint8)  # a view: no copy of the key is made
    try:
        OPS[torch.float32].draws(secret.ctypes.data, info.ctypes.data, len(text.info), text.place_at,
                                 labels.ctypes.data, shape[0], shape[1], orders, inverses, words, signs)  # fmt: skip
    finally:
        del secret  # a key that is looked at cannot be cleared
