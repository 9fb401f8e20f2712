"""Rows between a GPU and host memory that it can reach, and the call that lets the host answer in between.

All three are kernels, so a step with them is one run of the GPU's own queue: no copy engine, no interrupt. It knows
neither what rows are nor what the host does with them (kernels/host_jobs.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require
from tessera_kernels.triton_support import require_float

_BLOCK = 2048


@triton.jit(do_not_specialize=["tokens"])
def _carry_kernel(
    source, to, positions, slots, to_positions, to_slots, count, tokens, PARTS: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    if PARTS == 1:
        moved = tl.load(source + i, mask=real)
    else:
        moved = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            moved += tl.load(source + part * count + i, mask=real)
    tl.store(to + i, moved.to(to.dtype.element_ty), mask=real)
    if PLACES:  # there are at least as many programs' entries as tokens
        token = i < tokens
        tl.store(to_positions + i, tl.load(positions + i, mask=token), mask=token)
        tl.store(to_slots + i, tl.load(slots + i, mask=token), mask=token)


def carry(
    source: torch.Tensor,
    to: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Copy source (N, W), or the sum of float32 parts (P, N, W), to (N, W), in its type. Either may be pinned host
    memory; both contiguous. places: (positions, slots, where they go, where they go), (N,) int32, copied beside.
    Raises ValueError for a wrong shape or dtype."""
    parts = source.shape[0] if source.dim() == 3 else 1
    require_float("to", to)
    require(source.is_contiguous() and to.is_contiguous() and source.shape[-2:] == to.shape
            and (parts == 1 or source.dtype is torch.float32),
            "source is %s %s for %s; want the same rows, or float32 parts of them, contiguous", tuple(source.shape),
            source.dtype, tuple(to.shape))  # fmt: skip
    tokens = to.shape[0]
    for column in places or ():
        require(column.shape == (tokens,) and column.dtype is torch.int32 and column.is_contiguous(),
                "a column is %s %s; want (%d,) torch.int32 contiguous", tuple(column.shape), column.dtype,
                tokens)  # fmt: skip
    if tokens:
        _carry_kernel[(triton.cdiv(to.numel(), _BLOCK),)](
            source, to, *(places or (to,) * 4), to.numel(), tokens, PARTS=parts, PLACES=places is not None,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["word", "number"])
def _call_kernel(word, number):
    # one thread asks and looks until it is answered: what kernels before it wrote is visible to the host before the
    # number is, and what the host wrote before its answer is visible to the kernels behind it
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred other, unanswered;
        .reg .b32 lane, seen;
        mov.u32 lane, %tid.x;
        setp.ne.u32 other, lane, 0;
        @other bra DONE;
        fence.acq_rel.sys;
        st.relaxed.sys.global.u32 [$1], $2;
        LOOK:
        ld.acquire.sys.global.u32 seen, [$1];
        setp.ne.u32 unanswered, seen, 0;
        @unanswered bra LOOK;
        fence.acq_rel.sys;
        DONE:
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r", [word, number], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def call(word: torch.Tensor, number: int) -> None:
    """Write a job's number where the host looks for it, and hold the stream until the host has made it 0.

    word: (1,) int32 of pinned host memory, one stream's. For ever, where nobody looks."""
    _call_kernel[(1,)](word.data_ptr(), number, num_warps=1)
