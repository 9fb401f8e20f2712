"""The allocator's own suite on a GPU: every promise of tests/ext/test_allocator.py, and the model as judge."""

from __future__ import annotations

import pytest

from tests.ext import test_oracle as oracle
from tests.ext.fake import has_gpu
from tests.ext.test_allocator import *  # noqa: F403

del test_neighbours_are_one_mapping, test_mapping_budget  # noqa: F821  (Linux counts mappings, a GPU does not)

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")


@pytest.fixture
def kind() -> str:
    """The CUDA driver on the first GPU."""
    return "gpu"


def test_native_equals_model() -> None:
    """Random calls with any driver verb failing, as in tests/ext/test_oracle.py; every page keeps what was written."""
    oracle.judge("fault_gpu")
