"""Attention of a hybrid batch in one launch on a GPU: prompt chunks and decodes share the multiprocessors.

A constant number of programs runs; each takes an equal stretch of the decodes' keys (triton_attention_decode) and, one
after the other, whatever query tiles of the prompts nobody took yet (triton_attention_prefill). Programs of odd number
begin with their decodes, the others end with them, so that on every multiprocessor one program waits for memory while
another multiplies. How many chunks are prompts is read on the device, so a launch can stand in a CUDA graph of any
hybrid batch. It knows slots and lengths, and reads nothing at or past a length.
Source: POD-Attention (Kamath et al. 2025, arXiv:2410.18038); differs: the tiles of the two kernels it joins, tickets
for prompt tiles only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_ints
from tessera_kernels.triton_attention_decode import DecodeConfig, DecodeWorkspace, decode_constants, decode_program
from tessera_kernels.triton_attention_prefill import (
    PrefillConfig,
    bulk_fits,
    prefill_constants,
    prefill_tile,
    scratch,
    tiles_of_batch,
)
from tessera_kernels.triton_support import (
    LOG2_E,
    early,
    gdc_launch,
    gdc_wait,
    precision,
    require_float,
    room_for,
    settings_for,
    slab_of,
)


@dataclass(frozen=True, slots=True)
class HybridConfig:
    """How the kernel is cut; one number of warps for both halves. See PrefillConfig and DecodeConfig."""

    rows: int = 128
    prefill_keys: int = 64
    decode_keys: int = 64
    warps: int = 8
    stages: int = 2
    programs_per_sm: int = 2
    bulk: bool = True

    @property
    def prefill(self) -> PrefillConfig:
        """The prompts' half."""
        return PrefillConfig(self.rows, self.prefill_keys, self.warps, self.stages, self.bulk)

    @property
    def decode(self) -> DecodeConfig:
        """The decodes' half."""
        return DecodeConfig(self.decode_keys, 16, self.warps, self.stages, self.programs_per_sm)


def measured_config(q: torch.Tensor, dim: int) -> HybridConfig | None:
    """The setting measured faster than two launches on this device for this head size, if there is one."""
    found: dict[str, Any] | None = settings_for(q, "attention_hybrid").get(str(dim))
    return HybridConfig(**found) if found and q.dtype is not torch.float32 else None


@dataclass(slots=True)
class HybridWorkspace:
    """decode: partial sums and counters. tickets (2,) int32, zero between launches: tiles taken, programs done."""

    decode: DecodeWorkspace
    tickets: torch.Tensor
    config: HybridConfig

    @classmethod
    def make(
        cls, q: torch.Tensor, heads: int, kv_heads: int, dim: int, max_sequences: int, config: HybridConfig
    ) -> HybridWorkspace:
        """A workspace on q's device for batches of up to max_sequences decodes."""
        decode = DecodeWorkspace.make(q, heads, kv_heads, dim, max_sequences, config.decode)
        return cls(decode, torch.zeros(2, dtype=torch.int32, device=q.device), config)


# numbers that change from step to step must not choose another binary
@triton.jit(do_not_specialize=["window", "slots", "q_starts", "kv_lens", "counts"])
def _hybrid_kernel(
    q, k, v, out, partial, stats, arrived, tickets, slots, q_starts, kv_lens, counts, window, qk_scale, slot_stride,
    token_stride, head_stride, PROMPTS: tl.constexpr, DECODES: tl.constexpr, GROUPS: tl.constexpr,
    RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, P_ROWS: tl.constexpr, P_KEYS: tl.constexpr,
    D_ROWS: tl.constexpr, D_KEYS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    MIN_UNITS: tl.constexpr, WINDOW: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    prompts = tl.load(counts)
    decodes = tl.load(counts + 1)
    ends = tiles_of_batch(q_starts, prompts, PROMPTS, RATIO, P_ROWS)
    tiles = tl.max(ends, 0)
    first_decode = tl.load(q_starts + prompts).to(tl.int64) * GROUPS * RATIO * DIM
    for turn in range(2):
        if (turn + pid) % 2 == 1:
            decode_program(pid, q + first_decode, k, v, out + first_decode, partial, stats, arrived, slots + prompts,
                           kv_lens + prompts, slots, decodes, programs, window, qk_scale, slot_stride, token_stride,
                           head_stride, 1, DECODES, GROUPS, RATIO, DIM, BLOCK_D, D_ROWS, D_KEYS, STAGES, BLOCK_R,
                           PARTS, MIN_UNITS, 0, PRECISION)  # fmt: skip
        else:
            ticket = tl.atomic_add(tickets, 1)
            while ticket < tiles * GROUPS:
                # neighbours take the heads of one query tile: their keys differ, their length does not
                prefill_tile(ticket % GROUPS, ticket // GROUPS, ends, q, k, v, out, slots, q_starts, kv_lens, slots,
                             window, qk_scale, slot_stride, token_stride, head_stride, 1, GROUPS, RATIO, DIM, BLOCK_D,
                             P_ROWS, P_KEYS, STAGES, WINDOW, BULK, 0, PRECISION)  # fmt: skip
                ticket = tl.atomic_add(tickets, 1)
    tl.debug_barrier()
    if tl.atomic_add(tickets + 1, 1, sem="acq_rel") == programs - 1:
        tl.store(tickets, 0)
        tl.store(tickets + 1, 0)


def attention_hybrid(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    slots: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    workspace: HybridWorkspace,
    window: int = 0,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """softmax(scale * q k^T) v of prompt chunks and, behind them, decodes -> (N, H * D).

    q (N, H, D) contiguous; k_view, v_view (S, C, G, D); slots, kv_lens (B,), q_starts (B + 1,) and counts (2,) =
    (prompts, decodes) int32 on the device, prompts + decodes <= B. Chunk b sits at the end of its kv_lens[b] tokens;
    a decode is one row and may have length 0 (left out). Rows behind the last chunk are not written. Raises ValueError
    for a wrong shape, dtype or stride; numbers on the device are trusted. Reference: attention_slots.
    """
    require_float("q", q)
    slab = slab_of(k_view, v_view, q.dtype)
    batch, config = slots.shape[0], workspace.config
    require(q.dim() == 3 and q.shape[2] == slab.dim and q.is_contiguous() and q.shape[1] % slab.kv_heads == 0,
            "q is %s with strides %s; want (N, H, %d) contiguous, H a multiple of %d", tuple(q.shape), q.stride(),
            slab.dim, slab.kv_heads)  # fmt: skip
    require_ints("slots", slots, batch)
    require_ints("kv_lens", kv_lens, batch)
    require_ints("q_starts", q_starts, batch + 1)
    require_ints("counts", counts, 2)
    require(window >= 0, "window=%d is negative; 0 means no window", window)
    tokens, heads, dim = q.shape
    ratio, decode = heads // slab.kv_heads, workspace.decode
    require(decode.arrived.shape[0] >= batch * slab.kv_heads and decode.partial.shape[1:] == (ratio, slab.dim),
            "the workspace was made for %d counters and %s; want at least %d and %s", decode.arrived.shape[0],
            tuple(decode.partial.shape[1:]), batch * slab.kv_heads, (ratio, slab.dim))  # fmt: skip
    if out is None:
        out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    if not tokens or not batch:
        return out
    bulk = config.bulk and bulk_fits(k_view)
    if bulk:
        triton.set_allocator(scratch)
    halves = prefill_constants(slab, ratio, config.prefill) | decode_constants(slab, ratio, config.decode)
    for own in ("BLOCK_M", "BLOCK_N"):
        del halves[own]
    room = room_for(batch)
    _hybrid_kernel[(decode.programs,)](
        q, k_view, v_view, out, decode.partial, decode.stats, decode.arrived, workspace.tickets, slots, q_starts,
        kv_lens, counts, window, scale * LOG2_E, slab.slot_stride, slab.token_stride, slab.head_stride, PROMPTS=room,
        DECODES=room, P_ROWS=config.rows, P_KEYS=config.prefill_keys,
        D_ROWS=decode_constants(slab, ratio, config.decode)["BLOCK_M"], D_KEYS=config.decode_keys, **halves,
        WINDOW=window > 0, BULK=bulk, PRECISION=precision(q.dtype), num_warps=config.warps, **early(pdl),
    )  # fmt: skip
    return out
