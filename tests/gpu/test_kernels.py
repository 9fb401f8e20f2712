"""The GPU's kernels agree with float64 on fresh random ragged batches, and read nothing at or past a length.

Without a GPU they run under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels.py
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton

from scripts import gpu_checks as checks

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
# numpy, which the interpreter computes with, has no bfloat16
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(8, 2, 64), (3, 1, 80)] if INTERPRETED else checks.HEADS


def judge(found: checks.Found) -> None:
    """Every error within its bound, and at least one there."""
    results = list(found)
    assert results
    over = [f"{name}: {error:.3g} > {bound:.3g}" for name, error, bound in results if not error <= bound]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_decode(dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """Lengths around every tile edge, NaN right behind them, two runs on one workspace."""
    judge(checks.check_decode(checks.Bench(DEVICE, dtype), heads, kv_heads, dim, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
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


@pytest.mark.skipif(INTERPRETED, reason="graphs want a device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_in_a_graph(dtype: torch.dtype) -> None:
    """A captured launch reads lengths, slots and queries anew at each replay."""
    judge(checks.check_graph(checks.Bench(DEVICE, dtype)))


@pytest.mark.parametrize("name", ["triton_vattn", "fa_vattn"])
def test_backends(name: str) -> None:
    """Hybrid batches split into prompts and decodes and come back in one piece."""
    from engine.attention.base import backends

    missing = backends[name].missing()
    if missing and not (INTERPRETED and name == "triton_vattn"):
        pytest.skip(missing)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    heads, kv_heads, dim = (4, 2, 64) if INTERPRETED else (32, 8, 128)
    judge(checks.check_backend(checks.Bench(DEVICE, dtype), name, heads, kv_heads, dim))
