"""Matrices of many heads out of orders, signs and scales, in C++: what engine/scx/matrices.py defines and also does.

It knows numbers: rotations by two rounds of order, signs and Hadamard transform, and two of them with a scale between.
"""

from __future__ import annotations

import torch

from tessera_kernels.checks import require
from tessera_kernels.native import OPS

_TABLES = {8: 3, 20: 4}  # rows that are drawn for a head: tables that are made of them


def fits(drawn: torch.Tensor, into: torch.Tensor) -> bool:
    """Whether C++ builds these here: host memory, heads of 16, 32, 64, 128 or 256 entries."""
    dim = into.shape[-1]
    return (torch.float32 in OPS and drawn.device.type == into.device.type == "cpu" and 16 <= dim <= 256
            and not dim & (dim - 1) and drawn.is_contiguous() and into.is_contiguous())  # fmt: skip


def build(drawn: torch.Tensor, into: torch.Tensor) -> None:
    """drawn (8, ..., D) int16: for queries and keys, then for values, two orders and two rows of signs; into
    (3, ..., D, D) float32: the rotations, and the inverse of the values'. Or drawn (20, ..., D): two rotations each and
    the upper and lower halves of D float32 scales; into (4, ..., D, D): for queries, keys, values and the output.

    A rotation's bits are those of matrices.rotations_of; scaled ones differ from its within rounding. Raises ValueError
    for a wrong shape or dtype, IndexError for an order that is none.
    """
    rows, dim = drawn.shape[0], drawn.shape[-1]
    require(rows in _TABLES and drawn.dtype is torch.int16 and into.dtype is torch.float32
            and into.shape == (_TABLES[rows], *drawn.shape[1:], dim) and fits(drawn, into),
            "drawn is %s %s for %s %s; want (8, ..., D) torch.int16 and (3, ..., D, D) torch.float32, or 20 and 4, "
            "contiguous", tuple(drawn.shape), drawn.dtype, tuple(into.shape), into.dtype)  # fmt: skip
    OPS[torch.float32].build_maps(drawn.data_ptr(), into.data_ptr(), drawn[0].numel() // dim, dim, rows == 20)
