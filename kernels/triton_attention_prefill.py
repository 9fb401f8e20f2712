"""Causal attention of prompt chunks over KV slabs on a GPU: a ragged batch of chunks, each against its whole cache.

It knows slots as rows of a strided view. Each program describes its sequence's exact (kv_len, D) rectangle to the bulk
copy engine, which fills what lies outside with zeros without reading it: nothing at or past kv_len need be mapped.
All query heads of a kv head share a tile (rows are token-major), so keys and values are fetched once for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tessera_kernels.attention_slots import attention_reference
from tessera_kernels.checks import require, require_ints
from tessera_kernels.triton_support import (
    LOG2_E,
    Slab,
    early,
    gdc_launch,
    gdc_wait,
    power_of_two,
    precision,
    require_float,
    room_for,
    settings_for,
    slab_of,
    table_stride,
)

OVER_READ_TOKENS = 0
attention_prefill_reference = attention_reference


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Query rows (token, head) and keys a tile, warps, tiles in flight.

    bulk: keys and values come by the bulk copy engine, else by clamped loads (head sizes or strides it cannot take).
    """

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2
    bulk: bool = True


def measured_config(q: torch.Tensor, dim: int) -> PrefillConfig:
    """The fastest measured on this device for this head size, else one that fits anywhere."""
    found: dict[str, Any] | None = settings_for(q, "attention_prefill").get(str(dim))
    if found and q.dtype is not torch.float32:
        return PrefillConfig(**found)
    if q.dtype is torch.float32:  # multiplied without matrix units: larger tiles would not fit the registers
        return PrefillConfig(rows=16, keys=32 if dim <= 128 else 16, warps=4, stages=2, bulk=False)
    return PrefillConfig() if dim <= 128 else PrefillConfig(rows=64, keys=64, warps=4, stages=2)


@triton.jit
def _stretch(acc, norm, top, q_tile, k_desc, v_desc, k, v, base, pages, slot_stride, token_stride, position, kv_len,
             window, qk_scale, first, last, d,
             DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
             MASKED: tl.constexpr, WINDOW: tl.constexpr, BULK: tl.constexpr, PAGE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Key tiles first..last of one query tile; MASKED where a key of them may be hidden from a query. pages: the
    sequence's row of the block table (PAGE > 0)."""
    for step in tl.range(first, last, num_stages=STAGES):
        n0 = step * BLOCK_N
        row = n0 + tl.arange(0, BLOCK_N)
        if BULK:
            k_tile = k_desc.load([n0, 0])  # (BLOCK_N, BLOCK_D), zeros at and past kv_len
        else:
            # the last real row stands in for rows past the end: never an address beyond kv_len
            safe = tl.minimum(row, kv_len - 1)
            if PAGE == 0:
                at = base + safe.to(tl.int64) * token_stride
            else:
                block = tl.load(pages + safe // PAGE).to(tl.int64)
                at = base + block * slot_stride + (safe % PAGE).to(tl.int64) * token_stride
            if DIM == BLOCK_D:
                k_tile = tl.load(k + at[:, None] + d[None, :])
            else:
                k_tile = tl.load(k + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            seen = row[None, :] <= position[:, None]
            if WINDOW:
                seen &= row[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
        if WINDOW:  # a tile may hold no key that a query sees
            anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        else:
            anchor = new_top
        weight = tl.exp2(scores * qk_scale - anchor[:, None])
        keep = tl.exp2(top - anchor)
        norm = norm * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None]
        if BULK:
            v_tile = v_desc.load([n0, 0])
        else:
            if DIM == BLOCK_D:
                v_tile = tl.load(v + at[:, None] + d[None, :])
            else:
                v_tile = tl.load(v + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    return acc, norm, top


@triton.jit
def tiles_of_batch(q_starts, batch, BATCH: tl.constexpr, RATIO: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BATCH,) running sums of query tiles: tiles stand in line, sequence after sequence."""
    sequence = tl.arange(0, BATCH)
    real = sequence < batch
    starts = tl.load(q_starts + sequence, mask=real, other=0)
    lengths = tl.load(q_starts + sequence + 1, mask=real, other=0) - starts
    return tl.cumsum(tl.cdiv(lengths * RATIO, BLOCK_M), 0)


@triton.jit
def prefill_tile(
    group, index, ends, q, k, v, out, slots, q_starts, kv_lens, table, window, qk_scale, slot_stride, token_stride,
    head_stride, table_stride, GROUPS: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, BULK: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tile `index` of the line for one kv head. PAGE: tokens of a block of `table`; 0 for slabs."""
    b = tl.sum((ends <= index).to(tl.int32), 0)
    tile = index - tl.max(tl.where(ends <= index, ends, 0), 0)
    q_start = tl.load(q_starts + b)
    q_len = tl.load(q_starts + b + 1) - q_start
    kv_len = tl.load(kv_lens + b)
    tile = tl.cdiv(q_len * RATIO, BLOCK_M) - 1 - tile  # the longest first
    slot = tl.load(slots + b).to(tl.int64)
    base = (slot * slot_stride if PAGE == 0 else slot * 0) + group * head_stride
    pages = table + slot * table_stride

    d = tl.arange(0, BLOCK_D)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row: token m // RATIO, head m % RATIO of the group
    token = m // RATIO
    here = (token < q_len)[:, None] & (d < DIM)[None, :]
    q_row = ((q_start + token) * GROUPS + group) * RATIO + m % RATIO
    at_q = q_row.to(tl.int64)[:, None] * DIM + d[None, :]
    q_tile = tl.load(q + at_q, mask=here, other=0.0)
    before = kv_len - q_len  # tokens in the cache before this chunk
    position = before + tl.minimum(token, q_len - 1)
    first_position = before + tile * BLOCK_M // RATIO
    last_position = before + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // RATIO, q_len - 1)
    if BULK:
        k_desc = tl.make_tensor_descriptor(k + base, [kv_len, DIM], [token_stride, 1], [BLOCK_N, BLOCK_D])
        v_desc = tl.make_tensor_descriptor(v + base, [kv_len, DIM], [token_stride, 1], [BLOCK_N, BLOCK_D])
    else:
        k_desc = k
        v_desc = v
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = last_position // BLOCK_N + 1
    if WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // BLOCK_N
        acc, norm, top = _stretch(acc, norm, top, q_tile, k_desc, v_desc, k, v, base, pages, slot_stride, token_stride,
                                  position, kv_len, window, qk_scale, first, last, d, DIM, BLOCK_D, BLOCK_N, STAGES,
                                  True, True, BULK, PAGE, PRECISION)  # fmt: skip
    else:
        whole = (first_position + 1) // BLOCK_N  # tiles that every query of this tile sees whole
        acc, norm, top = _stretch(acc, norm, top, q_tile, k_desc, v_desc, k, v, base, pages, slot_stride, token_stride,
                                  position, kv_len, window, qk_scale, 0, whole, d, DIM, BLOCK_D, BLOCK_N, STAGES,
                                  False, False, BULK, PAGE, PRECISION)  # fmt: skip
        acc, norm, top = _stretch(acc, norm, top, q_tile, k_desc, v_desc, k, v, base, pages, slot_stride, token_stride,
                                  position, kv_len, window, qk_scale, whole, last, d, DIM, BLOCK_D, BLOCK_N, STAGES,
                                  True, False, BULK, PAGE, PRECISION)  # fmt: skip
    tl.store(out + at_q, (acc / norm[:, None]).to(out.dtype.element_ty), mask=here)


# numbers that change from step to step must not choose another binary
@triton.jit(do_not_specialize=["batch", "window", "slots", "q_starts", "kv_lens", "table"])
def _prefill_kernel(
    q, k, v, out, slots, q_starts, kv_lens, table, batch, window, qk_scale, slot_stride, token_stride, head_stride,
    table_stride, BATCH: tl.constexpr, GROUPS: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr,
    BULK: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch()
    ends = tiles_of_batch(q_starts, batch, BATCH, RATIO, BLOCK_M)
    index = tl.program_id(1)
    if index >= tl.max(ends, 0):
        return
    prefill_tile(tl.program_id(0), index, ends, q, k, v, out, slots, q_starts, kv_lens, table, window, qk_scale,
                 slot_stride, token_stride, head_stride, table_stride, GROUPS, RATIO, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                 STAGES, WINDOW, BULK, PAGE, PRECISION)  # fmt: skip


def bulk_fits(k_view: torch.Tensor) -> bool:
    """Whether the bulk copy engine can fetch rows of this view: every stride and the start on 16 bytes."""
    size = k_view.element_size()
    return all(stride * size % 16 == 0 for stride in k_view.stride()[:3]) and k_view.data_ptr() % 16 == 0


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for the descriptors that programs make; torch's allocator keeps it inside a CUDA graph's pool."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def prefill_constants(slab: Slab, ratio: int, config: PrefillConfig) -> dict[str, int]:
    """The kernel's constants that heads and setting decide."""
    return {
        "GROUPS": slab.kv_heads, "RATIO": ratio, "DIM": slab.dim, "BLOCK_D": max(16, power_of_two(slab.dim)),
        "BLOCK_M": config.rows, "BLOCK_N": config.keys, "STAGES": config.stages,
    }  # fmt: skip


def attention_prefill(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    slots: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
    pdl: bool = False,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v -> (N, H * D).

    q (N, H, D) contiguous; k_view, v_view (S, C, G, D); slots, kv_lens (B,) and q_starts (B + 1,) int32 on the device;
    rows of q beyond q_starts[B] are not computed. Query i of sequence b sits at position kv_lens[b] - q_len + i and
    sees keys up to its own position, the last `window` of them when window > 0. The grid depends on N and B alone, so
    a launch can stand in a CUDA graph. table (S, M) int32: k_view and v_view are blocks (blocks, T, G, D), and block m
    of a slot holds its tokens m * T and on; they are then loaded row by row, never by the bulk copy engine. Raises
    ValueError for a wrong shape, dtype or stride; slots and lengths are trusted. Source: FlashAttention-2 (Dao 2023,
    arXiv:2307.08691); differs: heads packed, slabs instead of batches.
    """
    require_float("q", q)
    slab = slab_of(k_view, v_view, q.dtype)
    sequences = slots.shape[0]
    require(q.dim() == 3 and q.shape[2] == slab.dim and q.is_contiguous() and q.shape[1] % slab.kv_heads == 0,
            "q is %s with strides %s; want (N, H, %d) contiguous, H a multiple of %d", tuple(q.shape), q.stride(),
            slab.dim, slab.kv_heads)  # fmt: skip
    require_ints("slots", slots, sequences)
    require_ints("kv_lens", kv_lens, sequences)
    require_ints("q_starts", q_starts, sequences + 1)
    require(window >= 0, "window=%d is negative; 0 means no window", window)
    tokens, heads, dim = q.shape
    ratio = heads // slab.kv_heads
    config = config or measured_config(q, dim)
    bulk = config.bulk and table is None and bulk_fits(k_view)
    if out is None:
        out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    if tokens and sequences:
        if bulk:
            triton.set_allocator(scratch)
        _prefill_kernel[(slab.kv_heads, triton.cdiv(tokens * ratio, config.rows) + sequences)](
            q, k_view, v_view, out, slots, q_starts, kv_lens, slots if table is None else table, sequences, window,
            scale * LOG2_E, slab.slot_stride, slab.token_stride, slab.head_stride, table_stride(table),
            BATCH=room_for(sequences), **prefill_constants(slab, ratio, config), WINDOW=window > 0, BULK=bulk,
            PAGE=0 if table is None else k_view.shape[1], PRECISION=precision(q.dtype), num_warps=config.warps,
            **early(pdl),
        )  # fmt: skip
    return out
