"""A linear map of every head of an attention output on a GPU: what undoes the map of the values, in one launch.

Maps lie in tables as in triton_encode_heads. It stands directly before the output projection, whose operand it writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_ints, require_rows
from tessera_kernels.triton_encode_heads import HEADS_A_PROGRAM, NO_SLOT, Tile, exactness, map_rows, require_map
from tessera_kernels.triton_support import power_of_two, require_float


@triton.jit(do_not_specialize=["slots"])
def _permute_heads_kernel(
    attended, slots, out_map, out, map_stride, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    j = tl.arange(0, BLOCK_DIM)
    slot = tl.load(slots + token).to(tl.int64)
    real = (head < HEADS)[:, None] & (j < DIM)[None, :]
    live = real & (slot >= 0)
    entry = slot * map_stride + (head // (HEADS // GROUPS))[:, None] * DIM + j[None, :]
    source = tl.load(out_map + entry, mask=live, other=0).to(tl.int32)
    row = (token * HEADS + head[:, None]) * DIM
    tl.store(out + row + j[None, :], tl.load(attended + row + source, mask=live, other=0.0), mask=real)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _matrix_heads_kernel(
    attended, slots, out_map, out, tokens, map_stride, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RATIO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    RATIO: tl.constexpr = HEADS // GROUPS
    group = tl.program_id(1)
    row = tl.arange(0, BLOCK_ROWS)  # (token of the tile, query head of the group)
    member = row % BLOCK_RATIO
    token = (tl.program_id(0) * BLOCK_TOKENS + row // BLOCK_RATIO).to(tl.int64)
    real = (row < BLOCK_TOKENS * BLOCK_RATIO) & (token < tokens) & (member < RATIO)
    slot = tl.load(slots + token, mask=real, other=-1)
    live = real & (slot >= 0)
    i = tl.arange(0, BLOCK_HALF)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = ((token * HEADS + group * RATIO + member) * DIM)[:, None]
    inside = live[:, None] & (i < HALF)[None, :]
    first = tl.load(attended + head + i[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(attended + head + HALF + i[None, :], mask=inside, other=0.0).to(tl.float32)
    mapped = map_rows(first, second, tl.where(live, slot, NO_SLOT), out_map + group * DIM * DIM, map_stride, n, DIM,
                      BLOCK_HALF, BLOCK_N, PRECISION)  # fmt: skip
    tl.store(out + head + n[None, :], mapped.to(out.dtype.element_ty), mask=real[:, None] & (n < DIM)[None, :])


def decode_heads(
    attended: torch.Tensor,
    slots_of_token: torch.Tensor,
    out_map: torch.Tensor,
    heads: int,
    *,
    one_each: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """attended (N, H * D), each head mapped by its slot's row of out_map in fp32 and rounded once: (N, H * D), in `out`
    where given.

    Maps, one_each and what is checked as in triton_encode_heads.encode_store; rows of a negative slot become zero.
    """
    require_float("attended", attended)
    tokens, (groups, dim) = slots_of_token.shape[0], out_map.shape[1:3]
    require_rows("attended", attended, heads * dim, attended.dtype)
    require(attended.shape[0] == tokens, "attended has %d rows for %d slots; want as many", attended.shape[0], tokens)
    require_ints("slots_of_token", slots_of_token, tokens)
    require_map(out_map, out_map, heads, groups, dim)
    out = torch.empty_like(attended) if out is None else out
    require_rows("out", out, heads * dim, attended.dtype)
    require(out.shape == attended.shape, "out has %d rows for %d", out.shape[0], tokens)
    if tokens and out_map.dim() == 3:
        _permute_heads_kernel[(tokens, triton.cdiv(heads, HEADS_A_PROGRAM))](
            attended, slots_of_token, out_map, out, out_map.stride(0), HEADS=heads, GROUPS=groups, DIM=dim,
            BLOCK_DIM=power_of_two(dim), BLOCK_HEADS=HEADS_A_PROGRAM, num_warps=4,
        )  # fmt: skip
    elif tokens:
        tile = Tile.of(heads // groups, dim, one_each)
        _matrix_heads_kernel[(triton.cdiv(tokens, tile.tokens), groups, triton.cdiv(dim, tile.columns))](
            attended, slots_of_token, out_map, out, tokens, out_map.stride(0), HEADS=heads, GROUPS=groups, DIM=dim,
            BLOCK_HALF=tile.half, BLOCK_N=tile.columns, BLOCK_TOKENS=tile.tokens, BLOCK_RATIO=tile.ratio,
            BLOCK_ROWS=tile.rows, PRECISION=exactness(attended.dtype), num_warps=4,
        )  # fmt: skip
    return out
