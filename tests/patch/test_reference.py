"""The reference data, where it is: every text, id, decode and merge case of the published code is reproduced."""

from __future__ import annotations

import pytest

from engine.patching.verify import BASES, VECTORS, compare_base, compare_vectors
from tests.patch.bases import reference_dir


@pytest.mark.parametrize("name", BASES)
def test_bases(name: str) -> None:
    """200 texts each: tokens, ids, decodes with and without special tokens, through our own files, upstream mode."""
    found = compare_base(reference_dir() / f"{name}.tar.gz")
    assert found.cases == 200
    assert found.differences == ()


def test_merge_rule() -> None:
    """1,500 token-level cases, many of which separate priority order from longest match."""
    found = compare_vectors(reference_dir() / VECTORS)
    assert found.cases == 1500
    assert found.differences == ()
