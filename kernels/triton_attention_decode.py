"""Decode attention over KV slabs on a GPU: one query token a sequence, split along the cache, GQA packed.

It knows slots as rows of a strided view. Rows at or past a sequence's kv_len are never touched: every address is
clamped below it, so nothing beyond need be mapped. Lengths are read on the device and the grid is a constant of the
device, so a launch can stand in a CUDA graph while lengths change.

Work is cut evenly: all (sequence, kv head, tile of keys) units stand in one line and each of P programs takes an equal
stretch of it, whatever the lengths. A stretch that covers only part of a (sequence, head) leaves its sums in a
workspace; whoever of its programs is last adds them up (split-KV as in Flash-Decoding, stretches as in Stream-K,
Osama et al. 2023, arXiv:2301.03598).

The line is written once a step (`line_up`) and read by every layer: what a unit is follows from its number alone, so
the tiles of the next sequence are on their way while those of this one are multiplied, and no layer searches again.
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
    early,
    gdc_launch,
    gdc_wait,
    join_threads,
    power_of_two,
    precision,
    require_float,
    room_for,
    settings_for,
    slab_of,
    sms_of,
    table_stride,
)

OVER_READ_TOKENS = 0
MIN_TILES = 2  # a program takes at least this many tiles, so that short batches are not cut to dust


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is cut: keys a tile, query rows a tile (16 at least), warps, tiles in flight, programs a
    multiprocessor."""

    keys: int = 64
    rows: int = 16
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2


@dataclass(slots=True)
class DecodeWorkspace:
    """What a step's launches share, and where partial sums wait: one per engine and window, as its layers run one
    after the other.

    partial (2P, H/G, D), stats (2P, 2, H/G) fp32; arrived (most sequences * G,) int32, all zero between launches.
    line (most units, 4) int32: slot, sequence * G + kv head, first row and kv_len of each unit; extent (2,) int32: how
    many units and programs this step has. window: keys a query sees, all when 0.
    """

    partial: torch.Tensor
    stats: torch.Tensor
    arrived: torch.Tensor
    line: torch.Tensor
    extent: torch.Tensor
    programs: int
    kv_heads: int
    window: int
    config: DecodeConfig

    @classmethod
    def make(
        cls, q: torch.Tensor, heads: int, kv_heads: int, dim: int, max_sequences: int, max_tokens: int,
        config: DecodeConfig | None = None, window: int = 0,
    ) -> DecodeWorkspace:  # fmt: skip
        """A workspace on q's device for batches of up to max_sequences, each of up to max_tokens."""
        config = config or measured_config(q, dim)
        programs = sms_of(q) * config.programs_per_sm
        ratio = heads // kv_heads
        floats, ints = ({"dtype": dtype, "device": q.device} for dtype in (torch.float32, torch.int32))
        seen = min(max_tokens, window + config.keys) if window else max_tokens
        units = max_sequences * kv_heads * triton.cdiv(seen, config.keys)
        return cls(
            partial=torch.empty((2 * programs, ratio, dim), **floats),
            stats=torch.empty((2 * programs, 2, ratio), **floats),
            arrived=torch.zeros(max_sequences * kv_heads, **ints),
            line=torch.empty((units, 4), **ints),
            extent=torch.zeros(2, **ints),
            programs=programs,
            kv_heads=kv_heads,
            window=window,
            config=config,
        )


def measured_config(q: torch.Tensor, dim: int) -> DecodeConfig:
    """The fastest measured on this device for this head size, else one that fits anywhere."""
    found: dict[str, Any] | None = settings_for(q, "attention_decode").get(str(dim))
    if found and q.dtype is not torch.float32:
        return DecodeConfig(**found)
    wide = power_of_two(dim) * q.element_size()  # bytes of a row of a tile
    return DecodeConfig(keys=64 if wide <= 256 else 32, stages=3 if wide <= 512 else 2)


@triton.jit
def _tiles_of(kv_len, window, BLOCK_N: tl.constexpr):
    """(first tile, number of tiles) that hold the keys a query at kv_len - 1 sees."""
    first = tl.where(window > 0, tl.maximum(kv_len - window, 0) // BLOCK_N, 0)
    return first, tl.cdiv(kv_len, BLOCK_N) - first


@triton.jit
def _owner(unit, total, programs):
    """The program whose stretch [p * total // programs, (p + 1) * total // programs) holds `unit`."""
    return (((unit + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


@triton.jit
def _begin(program, total, programs):
    """First unit of a program's stretch."""
    return (program.to(tl.int64) * total // programs).to(tl.int32)


@triton.jit
def _combine(partial, stats, out_rows, first_unit, last_unit, total, programs,
             RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    """Adds up the partial sums of units first_unit..last_unit and stores the outputs of a kv head's query heads."""
    p0 = _owner(first_unit, total, programs)
    p1 = _owner(last_unit, total, programs)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    norm = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(p0, p1 + 1, PARTS):
        p = start + tl.arange(0, PARTS)
        # a program's first partial is number 0; the first owner's is number 1 when its stretch began before us
        later = (p == p0) & (_begin(p, total, programs) != first_unit)
        index = (2 * p + later.to(tl.int32)).to(tl.int64)
        here = (p <= p1)[:, None] & (r < RATIO)[None, :]  # (PARTS, BLOCK_R)
        at = (index * 2)[:, None] * RATIO + r[None, :]
        m = tl.load(stats + at, mask=here, other=-float("inf"), cache_modifier=".cg")
        s = tl.load(stats + at + RATIO, mask=here, other=0.0, cache_modifier=".cg")
        row = index[:, None] * RATIO + r[None, :]
        a = tl.load(partial + row[:, :, None] * DIM + d[None, None, :],
                    mask=here[:, :, None] & (d < DIM)[None, None, :], other=0.0, cache_modifier=".cg")  # fmt: skip
        new_top = tl.maximum(top, tl.max(m, 0))
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)  # rows past the last head have no top
        weight = tl.exp2(m - anchor[None, :])
        keep = tl.exp2(top - anchor)
        norm = norm * keep + tl.sum(s * weight, 0)
        acc = acc * keep[:, None] + tl.sum(a * weight[:, :, None], 0)
        top = new_top
    value = acc / tl.maximum(norm, 1e-30)[:, None]
    tl.store(out_rows + r[:, None] * DIM + d[None, :], value.to(out_rows.dtype.element_ty),
             mask=(r < RATIO)[:, None] & (d < DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["batch", "programs", "window", "slots", "kv_lens"])
def _line_kernel(
    line, extent, slots, kv_lens, batch, programs, window, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_UNITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    sequence = tl.arange(0, BATCH)
    lens = tl.load(kv_lens + sequence, mask=sequence < batch, other=0)
    _, tiles_of_sequence = _tiles_of(lens, window, BLOCK_N)
    ends = tl.cumsum(tiles_of_sequence * GROUPS, 0)
    total = tl.max(ends, 0)
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(extent, total)
        # fewer programs for little work
        tl.store(extent + 1, tl.minimum(programs, tl.maximum(total // MIN_UNITS, 1)))
    last = _begin(pid + 1, total, tl.num_programs(0))
    for first in range(_begin(pid, total, tl.num_programs(0)), last, AT_ONCE):
        unit = first + tl.arange(0, AT_ONCE)
        here = unit < last
        before = ends[None, :] <= unit[:, None]  # (AT_ONCE, BATCH)
        b = tl.where(here, tl.sum(before.to(tl.int32), 1), 0)
        begin = tl.max(tl.where(before, ends[None, :], 0), 1)
        kv_len = tl.load(kv_lens + b)
        first_tile, tiles = _tiles_of(kv_len, window, BLOCK_N)
        tiles = tl.maximum(tiles, 1)
        at = line + unit * 4
        tl.store(at, tl.load(slots + b), mask=here)
        tl.store(at + 1, b * GROUPS + (unit - begin) // tiles, mask=here)
        tl.store(at + 2, (first_tile + (unit - begin) % tiles) * BLOCK_N, mask=here)
        tl.store(at + 3, kv_len, mask=here)


@triton.jit
def _unit(line, unit, end):
    """(slot, sequence * G + kv head, first row, kv_len) of a unit below `end`."""
    at = line + unit * 4
    here = unit < end
    return (tl.load(at, mask=here, other=0), tl.load(at + 1, mask=here, other=0), tl.load(at + 2, mask=here, other=0),
            tl.load(at + 3, mask=here, other=1))  # fmt: skip


# numbers that change from step to step must not choose another binary
@triton.jit(do_not_specialize=["window", "line", "extent", "table"])
def _decode_kernel(
    q, k, v, out, partial, stats, arrived, line, extent, table, window, qk_scale, slot_stride, token_stride,
    head_stride, table_stride, RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `pid` of `programs`: its stretch of the line. PAGE: tokens of a block of `table`; 0 for slabs."""
    if PDL:
        gdc_wait()
        gdc_launch()
    pid = tl.program_id(0)
    total = tl.load(extent)
    programs = tl.load(extent + 1)
    first_of_stretch = _begin(pid, total, programs)
    last_of_stretch = tl.where(pid < programs, _begin(pid + 1, total, programs), first_of_stretch)
    d = tl.arange(0, BLOCK_D)
    m_row = tl.arange(0, BLOCK_M)
    n_row = tl.arange(0, BLOCK_N)
    real = (m_row < RATIO)[:, None] & (d < DIM)[None, :]  # (BLOCK_M, BLOCK_D)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    next_slot, next_head, next_row, next_len = _unit(line, first_of_stretch, last_of_stretch)
    for unit in tl.range(first_of_stretch, last_of_stretch, num_stages=STAGES):
        # numbers are read one turn ahead, so that no address waits for them
        slot, head, first_row, kv_len = next_slot.to(tl.int64), next_head, next_row, next_len
        next_slot, next_head, next_row, next_len = _unit(line, unit + 1, last_of_stretch)
        base = (slot * slot_stride if PAGE == 0 else slot * 0) + (head % GROUPS) * head_stride
        row = first_row + n_row
        # the last real row stands in for rows past the end: never an address beyond kv_len
        safe = tl.minimum(row, kv_len - 1)
        if PAGE == 0:
            at = base + safe.to(tl.int64) * token_stride
        else:
            block = tl.load(table + slot * table_stride + safe // PAGE).to(tl.int64)
            at = base + block * slot_stride + (safe % PAGE).to(tl.int64) * token_stride
        q_row = head * RATIO + m_row
        q_tile = tl.load(q + q_row[:, None] * DIM + d[None, :], mask=real, other=0.0)
        if DIM == BLOCK_D:
            k_tile = tl.load(k + at[:, None] + d[None, :])
            v_tile = tl.load(v + at[:, None] + d[None, :])
        else:
            k_tile = tl.load(k + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
            v_tile = tl.load(v + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        first_tile, tiles = _tiles_of(kv_len, window, BLOCK_N)
        first_unit = unit - (first_row // BLOCK_N - first_tile)
        # a new (sequence, head): what was summed so far is weighed with 0
        top = tl.where((unit == first_of_stretch) | (unit == first_unit), -float("inf"), top)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * qk_scale  # (BLOCK_M, BLOCK_N)
        seen = (row < kv_len) & ((window <= 0) | (row >= kv_len - window))
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every tile holds a key that is seen
        weight = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        norm = norm * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
        last_unit = first_unit + tiles - 1
        if (unit == last_unit) | (unit + 1 == last_of_stretch):
            if (first_unit >= first_of_stretch) & (unit == last_unit):
                value = acc / norm[:, None]
                tl.store(out + q_row[:, None] * DIM + d[None, :], value.to(out.dtype.element_ty), mask=real)
            else:
                index = (2 * pid + (first_unit > first_of_stretch).to(tl.int32)).to(tl.int64)
                tl.store(partial + (index * RATIO + m_row[:, None]) * DIM + d[None, :], acc, mask=real)
                tl.store(stats + (index * 2) * RATIO + m_row, top, mask=m_row < RATIO)
                tl.store(stats + (index * 2 + 1) * RATIO + m_row, norm, mask=m_row < RATIO)
                parts = _owner(last_unit, total, programs) - _owner(first_unit, total, programs) + 1
                join_threads()  # all of this program's stores come before its arrival
                before = tl.atomic_add(arrived + head, 1, sem="acq_rel")
                if before == parts - 1:
                    join_threads()
                    _combine(partial, stats, out + head * RATIO * DIM, first_unit, last_unit, total, programs, RATIO,
                             DIM, BLOCK_R, BLOCK_D, PARTS)  # fmt: skip
                    tl.store(arrived + head, 0)


def line_up(slots: torch.Tensor, kv_lens: torch.Tensor, workspace: DecodeWorkspace) -> None:
    """Writes the line of a step into its workspace, for every layer of the step.

    slots, kv_lens (B,) int32 on the device. A sequence of length 0 is left out: its rows of the output are not written.
    Raises ValueError for more sequences than the workspace has counters for; slots and lengths are trusted, as reading
    them would wait for the device.
    """
    batch, groups, config = slots.shape[0], workspace.kv_heads, workspace.config
    require_ints("slots", slots, batch)
    require_ints("kv_lens", kv_lens, batch)
    require(workspace.arrived.shape[0] >= batch * groups, "the workspace was made for %d counters; want at least %d",
            workspace.arrived.shape[0], batch * groups)  # fmt: skip
    if batch:
        room = room_for(batch)
        _line_kernel[(min(sms_of(slots), 128),)](
            workspace.line, workspace.extent, slots, kv_lens, batch, workspace.programs, workspace.window,
            BATCH=room, GROUPS=groups, BLOCK_N=config.keys, MIN_UNITS=MIN_TILES, AT_ONCE=max(2, min(64, 8192 // room)),
            num_warps=4,
        )  # fmt: skip


def attention_decode(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v of one query a sequence -> (B, H * D), for the sequences that line_up() was told of.

    q (B, H, D) contiguous; k_view, v_view (S, C, G, D). The query of sequence b sits at kv_lens[b] - 1 and sees its
    last workspace.window keys (all when 0). table (S, M) int32: k_view and v_view are blocks (blocks, T, G, D), and
    block m of a slot holds its tokens m * T and on. Raises ValueError for a wrong shape, dtype or stride.
    """
    require_float("q", q)
    slab = slab_of(k_view, v_view, q.dtype)
    require(q.dim() == 3 and q.shape[2] == slab.dim and q.is_contiguous() and q.shape[1] % slab.kv_heads == 0,
            "q is %s with strides %s; want (B, H, %d) contiguous, H a multiple of %d", tuple(q.shape), q.stride(),
            slab.dim, slab.kv_heads)  # fmt: skip
    batch, heads, ratio, config = q.shape[0], q.shape[1], q.shape[1] // slab.kv_heads, workspace.config
    require(workspace.kv_heads == slab.kv_heads and workspace.partial.shape[1:] == (ratio, slab.dim)
            and workspace.arrived.shape[0] >= batch * slab.kv_heads,
            "the workspace was made for %d kv heads, %s and %d counters; want %d, %s and at least %d",
            workspace.kv_heads, tuple(workspace.partial.shape[1:]), workspace.arrived.shape[0], slab.kv_heads,
            (ratio, slab.dim), batch * slab.kv_heads)  # fmt: skip
    if out is None:
        out = torch.empty((batch, heads * slab.dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    rows = power_of_two(ratio)
    _decode_kernel[(workspace.programs,)](
        q, k_view, v_view, out, workspace.partial, workspace.stats, workspace.arrived, workspace.line,
        workspace.extent, workspace.line if table is None else table, workspace.window, scale * LOG2_E,
        slab.slot_stride, slab.token_stride, slab.head_stride, table_stride(table), RATIO=ratio, DIM=slab.dim,
        BLOCK_D=max(16, power_of_two(slab.dim)), BLOCK_M=max(config.rows, rows), BLOCK_N=config.keys,
        GROUPS=slab.kv_heads, STAGES=config.stages, BLOCK_R=rows, PARTS=max(2, 4096 // power_of_two(ratio * slab.dim)),
        PAGE=0 if table is None else k_view.shape[1], PRECISION=precision(q.dtype), num_warps=config.warps,
        **early(pdl),
    )  # fmt: skip
    return out


def attention_decode_reference(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same by torch."""
    starts = torch.arange(slots.shape[0] + 1, dtype=torch.int32)
    return attention_reference(q, k_view, v_view, slots, starts, kv_lens, scale, window)
