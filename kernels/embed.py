"""Rows of a table by index: the token embedding, and the rows whose logits are wanted. It knows no vocabulary."""

from __future__ import annotations

import torch

from tessera_kernels.checks import require
from tessera_kernels.native import OPS, extension


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table (V, C), ids (N,) int32 or int64 -> (N, C). Raises IndexError for an id outside 0..V-1, ValueError for
    a wrong shape, dtype or stride."""
    if table.dtype not in OPS:
        return embed_reference(table, ids)
    require(table.dim() == 2 and table.is_contiguous(), "table is %s with strides %s; want (V, C) contiguous",
            tuple(table.shape), table.stride())  # fmt: skip
    wide = ids.dtype is torch.int64
    require(ids.dim() == 1 and (wide or ids.dtype is torch.int32) and ids.is_contiguous(),
            "ids is %s %s; want (N,) int32 or int64 contiguous", tuple(ids.shape), ids.dtype)  # fmt: skip
    rows, (vocab, width) = ids.shape[0], table.shape
    y = torch.empty((rows, width), dtype=table.dtype)
    extension().embed(table.data_ptr(), ids.data_ptr(), y.data_ptr(), rows, width * table.element_size(), wide, vocab)
    return y


def embed_reference(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same by torch."""
    return table[ids.long()]
