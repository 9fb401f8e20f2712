"""The index and the value of the largest element of each row on a GPU: greedy sampling. It knows nothing of tokens.

A row is cut into stretches, one program each; the last of a row's programs to arrive takes the largest of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require
from tessera_kernels.triton_support import early, gdc_launch, gdc_wait

_BLOCK = 4096
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _argmax_kernel(logits, best, arrived, ids, values, row_stride, V: tl.constexpr, BLOCK: tl.constexpr,
                   CUTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch()
    row, cut = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = cut * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + c, mask=c < V, other=-float("inf")) + 0.0  # -0 becomes +0: they are equal
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed integers, in the order of the floats
    order = tl.where(x != x, 0x7FFFFFFF, order)  # a NaN above all
    # one number that grows with the value and falls with the index
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - c).to(tl.int64)
    key = tl.where(c < V, key, _LOWEST)
    tl.store(best + row * CUTS + cut, tl.max(key, 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.debug_barrier()
        j = tl.arange(0, CUTS)
        all_keys = tl.load(best + row * CUTS + j, mask=j < tl.num_programs(1), other=_LOWEST, cache_modifier=".cg")
        top = tl.max(all_keys, 0)
        index = 0x7FFFFFFF - (top & 0x7FFFFFFF)
        tl.store(ids + row, index)
        tl.store(values + row, tl.load(logits + row * row_stride + index))
        tl.store(arrived + row, 0)


class RowArgmax:
    """Argmax with a workspace for up to `max_rows` rows of up to `vocab` columns. Safe in a CUDA graph."""

    def __init__(self, max_rows: int, vocab: int, device: torch.device | str) -> None:
        self.max_rows, self.vocab = max_rows, vocab
        self._cuts = 1 << (triton.cdiv(vocab, _BLOCK) - 1).bit_length()
        self._best = torch.empty((max_rows, self._cuts), dtype=torch.int64, device=device)
        self._arrived = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def __call__(self, logits: torch.Tensor, pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (R, V) fp32 -> (R,) int64 ids, (R,) fp32 values; the lowest index among equals, a NaN above all.

        Raises ValueError for a wrong shape, dtype or stride. Reference: argmax.argmax_reference.
        """
        require(logits.dim() == 2 and logits.dtype is torch.float32 and logits.stride(1) == 1
                and 0 < logits.shape[1] <= self.vocab and logits.shape[0] <= self.max_rows,
                "logits is %s %s; want (R <= %d, V <= %d) torch.float32 with contiguous rows", tuple(logits.shape),
                logits.dtype, self.max_rows, self.vocab)  # fmt: skip
        rows = logits.shape[0]
        ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
        values = torch.empty(rows, dtype=torch.float32, device=logits.device)
        if rows:
            _argmax_kernel[(rows, triton.cdiv(logits.shape[1], _BLOCK))](
                logits, self._best, self._arrived, ids, values, logits.stride(0), V=logits.shape[1], BLOCK=_BLOCK,
                CUTS=self._cuts, num_warps=8, **early(pdl),
            )  # fmt: skip
        return ids, values
