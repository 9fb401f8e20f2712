"""silu(gate) * up on a GPU, over rows that hold gate and up side by side.

It knows nothing of the products around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_rows
from tessera_kernels.triton_support import early, gdc_launch, gdc_wait, require_float

_BLOCK, _WARPS = 2048, 8


@triton.jit(do_not_specialize=["rows"])
def _silu_mul_kernel(x, y, rows, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch()
    # the last rows first: they were written last, so they are still in the cache
    row = rows - 1 - tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * HALF + c, mask=c < HALF, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(x + row * 2 * HALF + HALF + c, mask=c < HALF, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # rounded between the two, where a model that keeps activations in this type rounds
    silu = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * HALF + c, (silu * up).to(y.dtype.element_ty), mask=c < HALF)


def silu_mul(x: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """x (N, 2F) = [gate, up] -> silu(gate) * up, (N, F); rounds silu(gate) first. Raises ValueError for a wrong shape
    or stride. Reference: silu_mul.silu_mul_reference."""
    require_float("x", x)
    require(x.dim() == 2 and x.shape[1] % 2 == 0, "x is %s; want (N, 2F)", tuple(x.shape))
    rows, double = x.shape
    require_rows("x", x, double, x.dtype)
    y = torch.empty((rows, double // 2), dtype=x.dtype, device=x.device)
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(double // 2, _BLOCK))](
            x, y, rows, HALF=double // 2, BLOCK=_BLOCK, num_warps=_WARPS, **early(pdl)
        )
    return y
