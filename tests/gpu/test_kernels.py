"""The GPU's kernels agree with float64 on fresh random ragged batches, and read nothing at or past a length.

Without a GPU they run under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels.py
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
from scripts import gpu_scx_kernels, gpu_timing

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
# numpy, which the interpreter computes with, has no bfloat16
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(8, 2, 64), (3, 1, 80)] if INTERPRETED else checks.HEADS
# every head size in bfloat16, two in the others: what is compiled decides how long this takes
SHAPES = [(dtype, *heads) for dtype in DTYPES for heads in (HEADS if dtype is torch.bfloat16 else HEADS[:2])]
# every shape that a backend declares
ATTENDED = [
    (name, *heads)
    for name in backends
    if not name.startswith("cpu")
    for heads in (HEADS if INTERPRETED else backend_checks.shapes_for(name))
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Build what the attention tests launch side by side, on every core; a failure shows again in its test."""
    if INTERPRETED:
        return
    with gpu_timing.compiling_only(os.cpu_count() or 1, []), torch.inference_mode():
        for dtype, *heads in SHAPES:
            bench = checks.Bench(DEVICE, dtype)
            for check in (checks.check_decode, checks.check_prefill):
                for window in (0, 50):
                    list(check(bench, *heads, window))
        for name, *shape in ATTENDED:
            if name in ("triton_vattn", "triton_paged", "fa_vattn") and not backends[name].missing():
                list(attended(name, *shape))


def attended(name: str, heads: int, kv_heads: int, dim: int) -> checks.Found:
    """check_backend on batches drawn by a seed of the shape's own: what `compiled` builds is what the test launches."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    bench = checks.Bench(DEVICE, dtype, seed=heads * dim + kv_heads)
    return backend_checks.check_backend(bench, name, heads, kv_heads, dim)


def judge(found: checks.Found) -> None:
    """Every error within its bound, and at least one there."""
    results = list(found)
    assert results
    over = [f"{name}: {error:.3g} > {bound:.3g}" for name, error, bound in results if not error <= bound]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_decode(dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """Lengths around every tile edge, NaN right behind them, two runs on one workspace."""
    judge(checks.check_decode(checks.Bench(DEVICE, dtype), heads, kv_heads, dim, window))


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_prefill(dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """Chunks of one token and of many, both ways of loading."""
    judge(checks.check_prefill(checks.Bench(DEVICE, dtype), heads, kv_heads, dim, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576, 4096])
def test_rows(dtype: torch.dtype, width: int) -> None:
    """Norm, rotary store, SiLU, argmax."""
    judge(checks.check_rows(checks.Bench(DEVICE, dtype), width, 9, 3, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(64, 200), (192, 136)] if INTERPRETED else [(64, 200), (1024, 4096)])
def test_products(dtype: torch.dtype, rows: int, width: int) -> None:
    """One row and few rows, every ending, with a width no tile divides."""
    judge(checks.check_products(checks.Bench(DEVICE, dtype), rows, width))


@pytest.mark.skipif(INTERPRETED, reason="the library wants a device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_library(dtype: torch.dtype) -> None:
    """Every algorithm that cuBLASLt proposes is right, so that the table may name any."""
    judge(checks.check_library(checks.Bench(DEVICE, dtype)))


@pytest.mark.parametrize("kind", gpu_scx_kernels.KINDS)
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_encoded_heads(dtype: torch.dtype, kind: str, heads: int, kv_heads: int, dim: int) -> None:
    """Rotation, maps and stores in one launch and the way back, from runs of a slot and from slots one by one."""
    judge(gpu_scx_kernels.check_heads(checks.Bench(DEVICE, dtype), kind, heads, kv_heads, dim))


@pytest.mark.skipif(INTERPRETED, reason="graphs want a device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_in_a_graph(dtype: torch.dtype) -> None:
    """A captured launch reads lengths, slots and queries anew at each replay."""
    judge(checks.check_graph(checks.Bench(DEVICE, dtype)))


def skip_without(name: str) -> None:
    """Skip what this machine cannot run; the interpreter runs our own kernels."""
    missing = backends[name].missing()
    if missing and not (INTERPRETED and name.startswith("triton")):
        pytest.skip(missing)


@pytest.mark.parametrize(("name", "heads", "kv_heads", "dim"), ATTENDED)
def test_backends(name: str, heads: int, kv_heads: int, dim: int) -> None:
    """Random hybrid batches split into prompts and decodes and come back in one piece."""
    skip_without(name)
    judge(attended(name, heads, kv_heads, dim))


@pytest.mark.parametrize("name", ["triton_vattn", "fa_vattn", "fi_vattn"])
def test_a_long_context(name: str) -> None:
    """A decode and a chunk at 131,072 tokens, where elements' numbers need 64 bits; small in the interpreter."""
    skip_without(name)
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < backend_checks.LONG_BYTES:
        pytest.skip(f"needs {backend_checks.LONG_BYTES >> 30} GiB of free GPU memory")
    judge(backend_checks.check_long(checks.Bench(DEVICE, DTYPES[1]), name))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
@pytest.mark.parametrize("name", ["triton_vattn", "fa_vattn", "fi_vattn"])
def test_nothing_past_a_length_is_read(name: str, layout: str) -> None:
    """Real slabs with pages up to the last token only, in a process of its own: a fault would end it."""
    skip_without(name)
    code = f"from tests.gpu.test_kernels import *; judge(tail({name!r}, {layout!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-1500:]}"


def tail(name: str, layout: str) -> checks.Found:
    """check_tail on this machine's terms."""
    heads, kv_heads, dim = (4, 2, 64) if INTERPRETED else (32, 8, 128)
    return backend_checks.check_tail(checks.Bench(DEVICE, DTYPES[1]), name, layout, heads, kv_heads, dim)
