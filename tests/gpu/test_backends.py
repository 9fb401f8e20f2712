"""Every attention backend, called as the engine calls it, agrees with float64 on random batches, at 131,072 tokens, and
where nothing is mapped behind a length.

Without a GPU our own run under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/gpu/test_backends.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import triton

from engine.attention.base import backends
from scripts import gpu_backend_checks as backend_checks
from scripts import gpu_checks as checks
from scripts import gpu_timing

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # numpy, which the interpreter computes with, has no bfloat16
# every shape that a backend declares
ATTENDED = [
    (name, *heads)
    for name in backends
    if not name.startswith("cpu")
    for heads in ([(8, 2, 64), (3, 1, 80)] if INTERPRETED else backend_checks.shapes_for(name))
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Build what the tests launch side by side, on every core; a failure shows again in its test."""
    if INTERPRETED:
        return
    with gpu_timing.compiling_only(os.cpu_count() or 1, []), torch.inference_mode():
        for name, *shape in ATTENDED:
            if name in ("triton_vattn", "triton_paged", "fa_vattn") and not backends[name].missing():
                list(attended(name, *shape))


def attended(name: str, heads: int, kv_heads: int, dim: int) -> checks.Found:
    """check_backend on batches drawn by a seed of the shape's own: what `compiled` builds is what the test launches."""
    bench = checks.Bench(DEVICE, DTYPE, seed=heads * dim + kv_heads)
    return backend_checks.check_backend(bench, name, heads, kv_heads, dim)


def skip_without(name: str) -> None:
    """Skip what this machine cannot run; the interpreter runs our own kernels."""
    missing = backends[name].missing()
    if missing and not (INTERPRETED and name.startswith("triton")):
        pytest.skip(missing)


@pytest.mark.parametrize(("name", "heads", "kv_heads", "dim"), ATTENDED)
def test_backends(name: str, heads: int, kv_heads: int, dim: int) -> None:
    """Random hybrid batches split into prompts and decodes and come back in one piece."""
    skip_without(name)
    checks.judge(attended(name, heads, kv_heads, dim))


@pytest.mark.parametrize("name", ["triton_vattn", "fa_vattn", "fi_vattn"])
def test_a_long_context(name: str) -> None:
    """A decode and a chunk at 131,072 tokens, where elements' numbers need 64 bits; small in the interpreter."""
    skip_without(name)
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < backend_checks.LONG_BYTES:
        pytest.skip(f"needs {backend_checks.LONG_BYTES >> 30} GiB of free GPU memory")
    checks.judge(backend_checks.check_long(checks.Bench(DEVICE, DTYPE), name))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
@pytest.mark.parametrize("name", ["triton_vattn", "fa_vattn", "fi_vattn"])
def test_nothing_past_a_length_is_read(name: str, layout: str) -> None:
    """Real slabs with pages up to the last token only, in a process of its own: a fault would end it."""
    skip_without(name)
    code = f"from tests.gpu.test_backends import *; checks.judge(tail({name!r}, {layout!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-1500:]}"


def tail(name: str, layout: str) -> checks.Found:
    """check_tail on this machine's terms."""
    heads, kv_heads, dim = (4, 2, 64) if INTERPRETED else (32, 8, 128)
    return backend_checks.check_tail(checks.Bench(DEVICE, DTYPE), name, layout, heads, kv_heads, dim)
