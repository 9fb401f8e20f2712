"""Rotary position embedding and a linear map of every head on a GPU, keys and values stored into the slabs: one launch.

A map belongs to a slot and a KV head and lies in a table on the device: an order of the head's entries, int16
(S, G, D), or a matrix, float32 (S, G, D, D), applied as head @ map; the query heads of a KV head share it. It knows
neither where maps come from nor that they are secret. A token of a negative slot stores nothing and gets queries of
zero, which is how the padding rows of a CUDA graph pass through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_ints, require_rows
from tessera_kernels.triton_support import power_of_two, require_float, slab_of

HEADS_A_PROGRAM = 8
NO_SLOT = tl.constexpr(1 << 30)  # above every slot


@triton.jit(do_not_specialize=["tokens", "positions", "slots", "rows"])
def _permute_store_kernel(
    qkv, cos_sin, positions, slots, rows, q_map, k_map, v_map, q, k_view, v_view, tokens, q_stride, map_stride,
    slot_stride, token_stride, head_stride, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    j = tl.arange(0, BLOCK_DIM)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    is_q, is_v = head < HEADS, head >= HEADS + GROUPS
    is_k = (head >= HEADS) & (head < HEADS + GROUPS)
    real = (head < HEADS + 2 * GROUPS)[:, None] & (j < DIM)[None, :]
    live = real & (slot >= 0)

    group = tl.where(is_q, head // (HEADS // GROUPS), (head - HEADS) % GROUPS)
    entry = slot * map_stride + group[:, None] * DIM + j[None, :]
    source = tl.load(q_map + entry, mask=live & is_q[:, None], other=0).to(tl.int32)
    source += tl.load(k_map + entry, mask=live & is_k[:, None], other=0).to(tl.int32)
    source += tl.load(v_map + entry, mask=live & is_v[:, None], other=0).to(tl.int32)

    turned = live & (head < HEADS + GROUPS)[:, None]
    low = source < HALF
    partner = tl.where(low, source + HALF, source - HALF)
    width: tl.constexpr = (HEADS + 2 * GROUPS) * DIM
    a = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
    b = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
    for part in tl.static_range(PARTS):
        row = qkv + (part * tokens + token) * width + head[:, None] * DIM
        a += tl.load(row + source, mask=live, other=0.0).to(tl.float32)
        b += tl.load(row + partner, mask=turned, other=0.0).to(tl.float32)
    if PARTS > 1:  # a product is rounded before anything uses it, as if it had been stored
        a = a.to(q.dtype.element_ty).to(tl.float32)
        b = b.to(q.dtype.element_ty).to(tl.float32)
    table = cos_sin + position * DIM + tl.where(low, source, source - HALF)
    cos = tl.load(table, mask=turned, other=1.0)
    sin = tl.load(table + HALF, mask=turned, other=0.0)
    mapped = (a * cos + tl.where(low, -b, b) * sin).to(q.dtype.element_ty)

    tl.store(q + token * q_stride + head[:, None] * DIM + j[None, :], mapped, mask=real & is_q[:, None])
    place = slot * slot_stride + tl.load(rows + token).to(tl.int64) * token_stride + group[:, None] * head_stride
    tl.store(k_view + place + j[None, :], mapped, mask=live & is_k[:, None])
    tl.store(v_view + place + j[None, :], mapped, mask=live & is_v[:, None])


@triton.jit
def map_rows(first, second, slot, maps, map_stride, n, DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
             BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows (R, D), given as halves (R, D/2), times columns n of the matrix of each row's slot: (R, BLOCK_N) float32.

    slot (R,), NO_SLOT for rows that do not count; maps: the matrix of slot 0. One pass for each different slot.
    """
    HALF: tl.constexpr = DIM // 2
    i = tl.arange(0, BLOCK_HALF)
    inside = (i < HALF)[:, None] & (n < DIM)[None, :]
    done = tl.zeros((first.shape[0], BLOCK_N), tl.float32)
    current = tl.min(slot, axis=0)
    while current < NO_SLOT:
        mine = (slot == current)[:, None]
        matrix = maps + current.to(tl.int64) * map_stride + i[:, None] * DIM + n[None, :]
        upper = tl.load(matrix, mask=inside, other=0.0)
        lower = tl.load(matrix + HALF * DIM, mask=inside, other=0.0)
        done = tl.dot(tl.where(mine, first, 0.0), upper, done, input_precision=PRECISION)
        done = tl.dot(tl.where(mine, second, 0.0), lower, done, input_precision=PRECISION)
        slot = tl.where(slot == current, NO_SLOT, slot)
        current = tl.min(slot, axis=0)
    return done


@triton.jit(do_not_specialize=["tokens", "positions", "slots", "rows"])
def _matrix_store_kernel(
    qkv, cos_sin, positions, slots, rows, q_map, k_map, v_map, q, k_view, v_view, tokens, q_stride, map_stride,
    slot_stride, token_stride, head_stride, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RATIO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    RATIO: tl.constexpr = HEADS // GROUPS
    group, side = tl.program_id(1) % GROUPS, tl.program_id(1) // GROUPS  # sides: q, k, v
    row = tl.arange(0, BLOCK_ROWS)  # (token of the tile, query head of the group); of k and v only head 0
    member = row % BLOCK_RATIO
    token = (tl.program_id(0) * BLOCK_TOKENS + row // BLOCK_RATIO).to(tl.int64)
    real = (row < BLOCK_TOKENS * BLOCK_RATIO) & (token < tokens)
    real = real & (member < tl.where(side == 0, RATIO, 1))
    slot = tl.load(slots + token, mask=real, other=-1)
    live = real & (slot >= 0)
    i = tl.arange(0, BLOCK_HALF)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)

    head = tl.where(side == 0, group * RATIO + member, HEADS + (side - 1) * GROUPS + group)
    width: tl.constexpr = (HEADS + 2 * GROUPS) * DIM
    inside = live[:, None] & (i < HALF)[None, :]
    a = tl.zeros((BLOCK_ROWS, BLOCK_HALF), tl.float32)
    b = tl.zeros((BLOCK_ROWS, BLOCK_HALF), tl.float32)
    for part in tl.static_range(PARTS):
        x = qkv + ((part * tokens + token) * width + head * DIM)[:, None] + i[None, :]
        a += tl.load(x, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + token, mask=live, other=0).to(tl.int64)
    turned = inside & (side < 2)
    angles = cos_sin + (position * DIM)[:, None] + i[None, :]
    cos = tl.load(angles, mask=turned, other=1.0)
    sin = tl.load(angles + HALF, mask=turned, other=0.0)
    first, second = a * cos - b * sin, b * cos + a * sin

    maps = q_map
    if side == 1:
        maps = k_map
    if side == 2:
        maps = v_map
    mapped = map_rows(first, second, tl.where(live, slot, NO_SLOT), maps + group * DIM * DIM, map_stride, n, DIM,
                      BLOCK_HALF, BLOCK_N, PRECISION)  # fmt: skip
    mapped = mapped.to(q.dtype.element_ty)
    column = (n < DIM)[None, :]
    if side == 0:
        tl.store(q + (token * q_stride + head * DIM)[:, None] + n[None, :], mapped, mask=real[:, None] & column)
    else:
        view = k_view
        if side == 2:
            view = v_view
        at = tl.load(rows + token, mask=live, other=0).to(tl.int64) * token_stride
        place = slot.to(tl.int64) * slot_stride + at + group * head_stride
        tl.store(view + place[:, None] + n[None, :], mapped, mask=live[:, None] & column)


def encode_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots_of_token: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    heads: int,
    *,
    one_each: bool = False,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k, maps q, k and v by maps = (q's, k's, v's) of each token's slot, writes k and v at [slot, row],
    returns q (N, H, D), in `out` where given.

    qkv (N, (H + 2G) * D) in the slabs' type or float32, or (P, N, ...) float32 parts of a product cut along K; cos_sin
    (P, 2, D/2) fp32; positions, slots_of_token, rows (N,) int32 on the device, rows the positions unless given; k_view,
    v_view (S, C, G, D). one_each: no two tokens share a slot, so tiles of several would only wait for each other. All
    is fp32 up to the one rounding; an order rounds nothing, so for it a cut product is rounded first, as if stored.
    out: tokens may lie apart. Raises ValueError for a wrong shape, dtype or stride; slots, places and the entries of an
    order are trusted.
    """
    require_float("k_view", k_view)
    slab = slab_of(k_view, v_view, k_view.dtype)
    tokens, dim, groups = positions.shape[0], slab.dim, slab.kv_heads
    width, parts = (heads + 2 * groups) * dim, 1
    if qkv.dim() == 3:
        parts = qkv.shape[0]
        require(qkv.is_contiguous() and qkv.shape[1:] == (tokens, width) and qkv.dtype is torch.float32,
                "qkv is %s %s; want (P, %d, %d) torch.float32 contiguous", tuple(qkv.shape), qkv.dtype, tokens,
                width)  # fmt: skip
    else:
        require_rows("qkv", qkv, width, torch.float32 if qkv.dtype is torch.float32 else k_view.dtype)
        require(qkv.shape[0] == tokens, "qkv has %d rows for %d positions; want as many", qkv.shape[0], tokens)
    rows = positions if rows is None else rows
    for name, column in (("positions", positions), ("slots_of_token", slots_of_token), ("rows", rows)):
        require_ints(name, column, tokens)
    require(dim % 2 == 0 and cos_sin.dim() == 3 and cos_sin.shape[1:] == (2, dim // 2)
            and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous(),
            "cos_sin is %s %s; want (P, 2, %d) torch.float32 contiguous", tuple(cos_sin.shape), cos_sin.dtype,
            dim // 2)  # fmt: skip
    for one in maps:
        require_map(one, maps[0], heads, groups, dim)
    q = torch.empty((tokens, heads, dim), dtype=k_view.dtype, device=qkv.device) if out is None else out
    require(q.shape == (tokens, heads, dim) and q.stride()[1:] == (dim, 1) and q.dtype is k_view.dtype,
            "out is %s %s with strides %s; want (%d, %d, %d) %s, each token's heads contiguous", tuple(q.shape),
            q.dtype, q.stride(), tokens, heads, dim, k_view.dtype)  # fmt: skip
    common = (qkv, cos_sin, positions, slots_of_token, rows, *maps, q, k_view, v_view, tokens, q.stride(0),
              maps[0].stride(0), slab.slot_stride, slab.token_stride, slab.head_stride)  # fmt: skip
    if tokens and maps[0].dim() == 3:
        _permute_store_kernel[(tokens, triton.cdiv(heads + 2 * groups, HEADS_A_PROGRAM))](
            *common, HEADS=heads, GROUPS=groups, DIM=dim, BLOCK_DIM=power_of_two(dim), BLOCK_HEADS=HEADS_A_PROGRAM,
            PARTS=parts, num_warps=4,
        )  # fmt: skip
    elif tokens:
        tile = Tile.of(heads // groups, dim, one_each)
        _matrix_store_kernel[(triton.cdiv(tokens, tile.tokens), 3 * groups, triton.cdiv(dim, tile.columns))](
            *common, HEADS=heads, GROUPS=groups, DIM=dim, BLOCK_HALF=tile.half, BLOCK_N=tile.columns,
            BLOCK_TOKENS=tile.tokens, BLOCK_RATIO=tile.ratio, BLOCK_ROWS=tile.rows, PARTS=parts,
            PRECISION=exactness(k_view.dtype), num_warps=4,
        )  # fmt: skip
    return q


class Tile:
    """How a product with matrices is cut: tokens of a tile, query heads a KV head and rows (both powers of two, at
    least 16 rows for a product), half a head, and columns of a matrix at once."""

    def __init__(self, tokens: int, ratio: int, dim: int) -> None:
        self.tokens, self.ratio, self.rows = tokens, ratio, max(16, tokens * ratio)
        self.half, self.columns = max(16, power_of_two(dim // 2)), max(16, min(64, power_of_two(dim)))

    @staticmethod
    def of(ratio: int, dim: int, one_each: bool) -> Tile:
        """As many tokens as fill the rows of the smallest product, or one."""
        wide = power_of_two(ratio)
        return Tile(1 if one_each else max(1, 16 // wide), wide, dim)


def exactness(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: for a float32 model in float32; for 16 bits in three TF32 products, whose
    error is far below the rounding that follows."""
    return "ieee" if dtype is torch.float32 else "tf32x3"


def require_map(one: torch.Tensor, like: torch.Tensor, heads: int, groups: int, dim: int) -> None:
    """`one` is (S, G, D) int16 or (S, G, D, D) float32, contiguous behind its slots, strided as `like`."""
    wanted = torch.int16 if one.dim() == 3 else torch.float32
    inner = (groups, dim) if one.dim() == 3 else (groups, dim, dim)
    strides = (dim, 1) if one.dim() == 3 else (dim * dim, dim, 1)
    require(tuple(one.shape[1:]) == inner and one.dtype is wanted and one.stride()[1:] == strides
            and one.shape == like.shape and one.stride() == like.stride() and heads % groups == 0,
            "a map is %s %s with strides %s for %d heads; want (S, %d, %d) torch.int16 or (S, %d, %d, %d) "
            "torch.float32", tuple(one.shape), one.dtype, one.stride(), heads, groups, dim, groups, dim,
            dim)  # fmt: skip
