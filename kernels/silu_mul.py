"""silu(gate) * up over rows that hold gate and up side by side. It knows nothing of the products around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tessera_kernels.checks import require, require_rows
from tessera_kernels.native import OPS


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x (N, 2F) = [gate, up] -> silu(gate) * up, (N, F); bf16 rounds silu(gate) first, as transformers does.

    Raises ValueError for a wrong shape or stride.
    """
    ops = OPS.get(x.dtype)
    if ops is None:
        return silu_mul_reference(x)
    require(x.dim() == 2 and x.shape[1] % 2 == 0, "x is %s; want (N, 2F)", tuple(x.shape))
    rows, double = x.shape
    require_rows("x", x, double, x.dtype)
    y = torch.empty((rows, double // 2), dtype=x.dtype)
    ops.silu_mul(x.data_ptr(), y.data_ptr(), rows, double // 2)
    return y


def silu_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The same by torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
