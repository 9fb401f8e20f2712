"""The index of the largest value of each row: greedy sampling. It knows nothing of tokens."""

from __future__ import annotations

import torch

from tessera_kernels.checks import require
from tessera_kernels.native import OPS, extension


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits (R, V) fp32 -> (R,) int64; the lowest index among equals, a NaN counts as largest.

    Raises ValueError for a wrong shape, dtype or stride.
    """
    if torch.float32 not in OPS:
        return argmax_reference(logits)
    require(logits.dim() == 2 and logits.shape[1] > 0 and logits.dtype is torch.float32 and logits.stride(1) == 1,
            "logits is %s %s; want (R, V) torch.float32 with contiguous rows", tuple(logits.shape),
            logits.dtype)  # fmt: skip
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    extension().argmax(logits.data_ptr(), logits.stride(0), out.data_ptr(), logits.shape[0], logits.shape[1])
    return out


def argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """The same by torch."""
    return logits.argmax(dim=-1)
