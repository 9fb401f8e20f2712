"""Rows for n-grams: the released formulas on the reference matrices, bit for bit where the dtype rounds."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.errors import LoadError
from engine.patching.embeddings import METHODS, SIDES, narrow, patched_matrix, row_weights, widen

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(__file__).parent / "goldens"
ARCHIVES = sorted((ROOT.parent / "shared" / "reference" / "patch").glob("*.tar.gz"))
needs_archives = pytest.mark.skipif(not ARCHIVES, reason="no reference artefacts beside the repository")

Matrix = np.ndarray[Any, Any]


def small_goldens() -> tuple[dict[str, Matrix], list[list[int]]]:
    """The matrices by name, and the old ids of each new id."""
    with np.load(GOLDENS / "emb_small.npz", allow_pickle=False) as stored:
        matrices = {name: stored[name] for name in stored}
    return matrices, old_ids_of(json.loads((GOLDENS / "emb_small_converter.json").read_text()))


def old_ids_of(converter: list[dict[str, Any]]) -> list[list[int]]:
    """The converter's entries, in order of the new ids."""
    ordered = sorted(converter, key=lambda entry: entry["new"])
    assert [entry["new"] for entry in ordered] == list(range(len(ordered)))
    return [entry["old"] if isinstance(entry["old"], list) else [entry["old"]] for entry in ordered]


@pytest.mark.parametrize(("name", "method", "side"), [
    ("mean", "mean", "input"), ("mean", "mean", "output"), ("inc_exp", "exp", "input"), ("dec_exp", "exp", "output"),
])  # fmt: skip
def test_small_goldens_from_float32(name: str, method: Any, side: Any) -> None:
    """n-grams of 1 to 6 tokens: within float32 rounding, kept rows to the bit."""
    matrices, old_ids = small_goldens()
    found = patched_matrix(matrices["E"], "F32", old_ids, method, side)
    np.testing.assert_allclose(found, matrices[name], rtol=0, atol=3e-7)
    assert np.array_equal(found[:18], matrices[name][:18])


@pytest.mark.parametrize(("name", "method", "side"), [
    ("mean", "mean", "input"), ("inc_exp", "exp", "input"), ("dec_exp", "exp", "output"),
])  # fmt: skip
def test_small_goldens_from_bfloat16_to_the_bit(name: str, method: Any, side: Any) -> None:
    """The released code computes in the source dtype; so do we, product by product."""
    matrices, old_ids = small_goldens()
    found = widen(patched_matrix(narrow(matrices["E"], "BF16"), "BF16", old_ids, method, side), "BF16")
    assert np.array_equal(found, matrices[f"{name}_from_bf16"])


@needs_archives
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name[:1])
def test_whole_reference_matrices(archive: Path) -> None:
    """All 8191 rows of both reference artefacts, both methods, both sides, through their pickle-free mirror."""
    with tarfile.open(archive) as tar:
        inner = archive.name.removesuffix(".tar.gz")
        state = tar.extractfile(f"{inner}/upstream_state.json")
        arrays = tar.extractfile(f"{inner}/embeddings_golden.npz")
        assert state is not None and arrays is not None
        old_ids = old_ids_of(json.loads(state.read())["converter"])
        with np.load(io.BytesIO(arrays.read()), allow_pickle=False) as stored:
            goldens = {name: stored[name] for name in stored}
    for method in METHODS:
        for side in SIDES:
            found = patched_matrix(goldens[f"base_{side}"], "F32", old_ids, method, side)
            np.testing.assert_allclose(found, goldens[f"{method}_{side}"], rtol=0, atol=4e-7)


def test_weights_double_towards_the_end_for_the_input_and_towards_the_start_for_the_head() -> None:
    """1/7, 2/7, 4/7; never a row left without weight, however long the token."""
    np.testing.assert_allclose(row_weights(3, "exp", "input"), [1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(row_weights(3, "exp", "output"), [4 / 7, 2 / 7, 1 / 7])
    for count in (1, 2, 18, 5000):
        for method in METHODS:
            for side in SIDES:
                assert np.isclose(row_weights(count, method, side).sum(), 1.0)
    with pytest.raises(ValueError, match="unknown; known: exp, mean"):
        row_weights(2, "random", "input")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_computed_in_blocks_are_the_rows_computed_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix is widened a block at a time; where a block ends must not show."""
    random = np.random.default_rng(0)
    matrix = narrow(random.standard_normal((40, 6)).astype(np.float32), dtype)
    old_ids = [tuple(random.integers(0, 40, random.integers(1, 5)).tolist()) for _ in range(64)]
    whole = patched_matrix(matrix, dtype, old_ids, "exp", "output")
    monkeypatch.setattr("engine.patching.embeddings.BLOCK_BYTES", 100)
    assert np.array_equal(patched_matrix(matrix, dtype, old_ids, "exp", "output"), whole)
    assert whole.dtype == matrix.dtype


def test_a_bias_is_combined_like_a_row() -> None:
    """logit(n-gram) is linear in row and bias, so both must take the same weights."""
    bias = np.array([1.0, 2.0, 4.0], np.float32)
    assert np.allclose(patched_matrix(bias, "F32", [(2,), (0, 1)], "exp", "output"), [4.0, 4 / 3])


@pytest.mark.parametrize(("dtype", "old_ids", "said"), [
    ("F32", [(0,), (1, 9)], "stands for base ids [1, 9], but the model has rows 0..3"),
    ("F32", [(0,), ()], "new id 1 stands for no base id"),
    ("F32", [(-1,)], "rows 0..3 only"),
    ("F8_E4M3", [(0,)], "stored as F8_E4M3"),
])  # fmt: skip
def test_what_has_no_row_is_refused_by_name(dtype: str, old_ids: list[tuple[int, ...]], said: str) -> None:
    """Negative ids would silently index from the end."""
    with pytest.raises(LoadError) as caught:
        patched_matrix(np.zeros((4, 2), np.float32), dtype, old_ids, "mean", "input")
    assert said in str(caught.value)
