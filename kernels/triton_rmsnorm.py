"""Root-mean-square normalisation of rows on a GPU, with the residual addition and a split product's sum in one pass.

It knows nothing of what the rows are. Everything between load and store is float32; the residual is rounded once, the
result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_rows
from tessera_kernels.rmsnorm import rmsnorm_reference
from tessera_kernels.triton_support import early, gdc_launch, gdc_wait, power_of_two, require_float


@triton.jit(do_not_specialize=["rows"])
def _rmsnorm_kernel(x, weight, residual, y, rows, eps,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BLOCK)
    here = c < WIDTH
    w = tl.load(weight + c, mask=here, other=0.0).to(tl.float32)  # a constant: may be read before the wait
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):  # (PARTS, rows, WIDTH): a product cut along K
        total += tl.load(x + (part * rows + row) * WIDTH + c, mask=here, other=0.0).to(tl.float32)
    if ADD:
        # a whole product is rounded before it is added, as if it had been stored
        total = total.to(residual.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + row * WIDTH + c, mask=here, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + row * WIDTH + c, rounded, mask=here)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    tl.store(y + row * WIDTH + c, (total * scale * w).to(y.dtype.element_ty), mask=here)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x (N, C), weight (C,) -> x / rms(x) * weight, (N, C) in weight's dtype.

    With residual (N, C): residual += x in place, and the norm is of the sum. x may be (P, N, C) float32, the P parts
    of a product cut along K (triton_gemm.linear_parts); their sum is what is meant. Raises ValueError for a wrong
    shape, dtype or stride. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    require_float("weight", weight)
    width = weight.shape[0]
    parts = 1
    if x.dim() == 3:
        parts = x.shape[0]
        require(x.is_contiguous() and x.shape[2] == width and x.dtype is torch.float32,
                "x is %s %s; want (P, N, %d) torch.float32 contiguous", tuple(x.shape), x.dtype, width)  # fmt: skip
    else:
        require_rows("x", x, width, weight.dtype)
    rows = x.shape[-2]
    if residual is not None:
        require_rows("residual", residual, width, weight.dtype)
        require(residual.shape[0] == rows, "residual has %d rows and x %d; want as many", residual.shape[0], rows)
    y = torch.empty((rows, width), dtype=weight.dtype, device=x.device) if out is None else out
    if rows:
        block = power_of_two(width)
        _rmsnorm_kernel[(rows,)](
            x, weight, residual if residual is not None else x, y, rows, eps, WIDTH=width, BLOCK=block, PARTS=parts,
            ADD=residual is not None, num_warps=min(16, max(1, block // 512)), **early(pdl),
        )  # fmt: skip
    return y


def rmsnorm_parts_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same by torch, parts summed first."""
    whole = x.sum(0).to(weight.dtype) if x.dim() == 3 else x
    return rmsnorm_reference(whole, weight, eps, residual)
