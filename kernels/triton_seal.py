"""Rows of whole blocks change places in the slabs of several layers: one launch, in place.

Each layer, block and KV head has an order of its own, and K and V follow it alike. It knows neither why nor whose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require
from tessera_kernels.triton_support import power_of_two, require_float, slab_of

MOST_ENTRIES = 8192  # of a program's tile


@triton.jit
def _shuffle_kernel(
    first_slab, offsets, slots, firsts, order, slot_stride, token_stride, head_stride, blocks, GROUPS: tl.constexpr,
    DIM: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    side, block = tl.program_id(0), tl.program_id(1)  # (layer, K or V), block
    group, column = tl.program_id(2) % GROUPS, tl.program_id(2) // GROUPS
    j = tl.arange(0, BLOCK_SIZE)
    d = column * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    real = (j < SIZE)[:, None] & (d < DIM)[None, :]
    source = tl.load(order + (((side // 2) * blocks + block) * GROUPS + group) * SIZE + j, mask=j < SIZE, other=0)
    base = first_slab + tl.load(offsets + side) + tl.load(slots + block).to(tl.int64) * slot_stride
    base += tl.load(firsts + block).to(tl.int64) * token_stride + group * head_stride
    rows = tl.load(base + source.to(tl.int64)[:, None] * token_stride + d[None, :], mask=real)
    tl.debug_barrier()  # the whole tile is read before any of it is written
    tl.store(base + j.to(tl.int64)[:, None] * token_stride + d[None, :], rows, mask=real)


class BlockShuffle:
    """For the slabs (K view, V view), (S, C, G, D) each, of some layers; all of the same shape and strides."""

    def __init__(self, slabs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Raises ValueError for slabs that differ."""
        self._first = slabs[0][0]
        require_float("k_view", self._first)
        self._slab = slab_of(*slabs[0], self._first.dtype)
        places = []
        for k, v in slabs:
            for view in (k, v):
                require(view.shape == self._first.shape and view.stride() == self._first.stride()
                        and view.dtype is self._first.dtype, "slabs differ: %s %s and %s %s", tuple(view.shape),
                        view.stride(), tuple(self._first.shape), self._first.stride())  # fmt: skip
                places.append((view.data_ptr() - self._first.data_ptr()) // self._first.element_size())
        self._offsets = torch.tensor(places, dtype=torch.int64, device=self._first.device)

    def __call__(self, slots: torch.Tensor, firsts: torch.Tensor, order: torch.Tensor, layer: int = 0) -> None:
        """Row j of block p becomes what was row order[l, p, g, j] of it, for layers from number `layer` on.

        slots, firsts: (P,); order: (L, P, G, B), integers on the device. Places and orders are trusted. No block may
        stand there twice.
        """
        slab, (layers, blocks, groups, size) = self._slab, order.shape
        require(groups == slab.kv_heads and slots.shape == firsts.shape == (blocks,) and order.is_contiguous()
                and 0 <= layer <= self._offsets.shape[0] // 2 - layers,
                "order is %s for %d slots; want (L, P, %d, B) contiguous", tuple(order.shape), slots.shape[0],
                slab.kv_heads)  # fmt: skip
        tall = power_of_two(size)
        wide = max(1, min(power_of_two(slab.dim), MOST_ENTRIES // tall))
        _shuffle_kernel[(2 * layers, blocks, groups * triton.cdiv(slab.dim, wide))](
            self._first, self._offsets[2 * layer :], slots, firsts, order, slab.slot_stride, slab.token_stride,
            slab.head_stride, blocks, GROUPS=groups, DIM=slab.dim, SIZE=size, BLOCK_SIZE=tall, BLOCK_DIM=wide,
            num_warps=4,
        )  # fmt: skip
