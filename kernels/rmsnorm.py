"""Root-mean-square normalisation of rows, with the residual addition in the same pass.

It knows nothing of what the rows are. bf16 rounds where transformers' LlamaRMSNorm does: after the residual
addition, after the normalisation and after the weight.
"""

from __future__ import annotations

import torch

from tessera_kernels.checks import require_rows
from tessera_kernels.native import OPS


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x (N, C), weight (C,) -> x / rms(x) * weight, (N, C) in x's dtype.

    With residual (N, C): residual += x in place, and the norm is of the sum.
    Raises ValueError for a wrong shape, dtype or stride. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    ops = OPS.get(x.dtype)
    if ops is None:
        return rmsnorm_reference(x, weight, eps, residual)
    width = weight.shape[0]
    require_rows("x", x, width, weight.dtype)
    residual_ptr = 0
    if residual is not None:
        require_rows("residual", residual, width, x.dtype)
        if residual.shape[0] != x.shape[0]:
            raise ValueError(f"residual has {residual.shape[0]} rows and x {x.shape[0]}; want as many")
        residual_ptr = residual.data_ptr()
    y = torch.empty_like(x)
    ops.rmsnorm(x.data_ptr(), residual_ptr, weight.data_ptr(), y.data_ptr(), x.shape[0], width, eps)
    return y


def rmsnorm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same by torch, in fp32 (float64 for float64) between the roundings."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.double() if x.dtype is torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
