"""The GPU's kernels agree with float64 on fresh random ragged batches, and read nothing at or past a length.

Without a GPU they run under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
import triton

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


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_decode(dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """Lengths around every tile edge, NaN right behind them, two runs on one workspace."""
    checks.judge(checks.check_decode(checks.Bench(DEVICE, dtype), heads, kv_heads, dim, window))


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_prefill(dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """Chunks of one token and of many, both ways of loading."""
    checks.judge(checks.check_prefill(checks.Bench(DEVICE, dtype), heads, kv_heads, dim, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576, 4096])
def test_rows(dtype: torch.dtype, width: int) -> None:
    """Norm, rotary store, SiLU, argmax."""
    checks.judge(checks.check_rows(checks.Bench(DEVICE, dtype), width, 9, 3, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(64, 200), (192, 136)] if INTERPRETED else [(64, 200), (1024, 4096)])
def test_products(dtype: torch.dtype, rows: int, width: int) -> None:
    """One row and few rows, every ending, with a width no tile divides."""
    checks.judge(checks.check_products(checks.Bench(DEVICE, dtype), rows, width))


@pytest.mark.skipif(INTERPRETED, reason="the library wants a device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_library(dtype: torch.dtype) -> None:
    """Every algorithm that cuBLASLt proposes is right, so that the table may name any."""
    checks.judge(checks.check_library(checks.Bench(DEVICE, dtype)))


@pytest.mark.parametrize("kind", gpu_scx_kernels.KINDS)
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), SHAPES)
def test_encoded_heads(dtype: torch.dtype, kind: str, heads: int, kv_heads: int, dim: int) -> None:
    """Rotation, maps and stores in one launch and the way back, from runs of a slot and from slots one by one."""
    checks.judge(gpu_scx_kernels.check_heads(checks.Bench(DEVICE, dtype), kind, heads, kv_heads, dim))


@pytest.mark.skipif(INTERPRETED, reason="graphs want a device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_in_a_graph(dtype: torch.dtype) -> None:
    """A captured launch reads lengths, slots and queries anew at each replay."""
    checks.judge(checks.check_graph(checks.Bench(DEVICE, dtype)))
