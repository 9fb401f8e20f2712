"""Rotary position embedding of a step's q and k on a GPU, with k and v stored into the KV slabs.

It knows nothing of models or pages: angles come as a table, places as (slot, position). A negative slot stores
nothing, which is how the padding rows of a CUDA graph pass through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require, require_ints, require_rows
from tessera_kernels.triton_support import early, gdc_launch, gdc_wait, power_of_two, require_float, slab_of

_HEADS_A_PROGRAM = 16


@triton.jit(do_not_specialize=["tokens", "positions", "slots", "rows"])
def _rope_store_kernel(
    qkv, cos_sin, positions, slots, rows, q, k_view, v_view, tokens, slot_stride, token_stride, head_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, PARTS: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    if INTERLEAVED:
        d0, d1 = 2 * i, 2 * i + 1
    else:
        d0, d1 = i, i + HALF
    real = (head < HEADS + 2 * GROUPS)[:, None] & (i < HALF)[None, :]  # (BLOCK_HEADS, BLOCK_HALF)
    width: tl.constexpr = (HEADS + 2 * GROUPS) * DIM
    a = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    b = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    for part in tl.static_range(PARTS):
        row = qkv + (part * tokens + token) * width + head[:, None] * DIM
        a += tl.load(row + d0[None, :], mask=real, other=0.0).to(tl.float32)
        b += tl.load(row + d1[None, :], mask=real, other=0.0).to(tl.float32)
    if PARTS > 1:  # a product is rounded before anything uses it, as if it had been stored
        a = a.to(q.dtype.element_ty).to(tl.float32)
        b = b.to(q.dtype.element_ty).to(tl.float32)
    table = cos_sin + position.to(tl.int64) * 2 * HALF + i
    cos = tl.load(table, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(table + HALF, mask=i < HALF, other=0.0)[None, :]
    turned = (head < HEADS + GROUPS)[:, None]
    first = tl.where(turned, a * cos - b * sin, a).to(q.dtype.element_ty)
    second = tl.where(turned, b * cos + a * sin, b).to(q.dtype.element_ty)

    to_q = real & (head < HEADS)[:, None]
    q_row = q + (token * HEADS + head[:, None]) * DIM
    tl.store(q_row + d0[None, :], first, mask=to_q)
    tl.store(q_row + d1[None, :], second, mask=to_q)
    kept = slot >= 0
    place = slot.to(tl.int64) * slot_stride + tl.load(rows + token).to(tl.int64) * token_stride
    to_k = real & turned & (head >= HEADS)[:, None] & kept
    k_row = k_view + place + (head - HEADS)[:, None] * head_stride
    tl.store(k_row + d0[None, :], first, mask=to_k)
    tl.store(k_row + d1[None, :], second, mask=to_k)
    to_v = real & (head >= HEADS + GROUPS)[:, None] & kept
    v_row = v_view + place + (head - HEADS - GROUPS)[:, None] * head_stride
    tl.store(v_row + d0[None, :], first, mask=to_v)
    tl.store(v_row + d1[None, :], second, mask=to_v)


def rope_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots_of_token: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    heads: int,
    interleaved: bool = False,
    pdl: bool = False,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k, writes k and v at [slot, row], returns q (N, H, D), in `out` where given.

    qkv (N, (H + 2G) * D), or (P, N, ...) float32 parts of a product cut along K; cos_sin (P, 2, D/2) fp32; positions,
    slots_of_token, rows (N,) int32 on the device, rows the positions unless given; k_view, v_view (S, C, G, D). Pairs
    are (i, i + D/2), or (2i, 2i + 1) when `interleaved`. A token with slot -1 gets its q and stores nothing. Raises
    ValueError for a wrong shape, dtype or stride; places are trusted. Source: Su et al. 2021, arXiv:2104.09864.
    """
    require_float("k_view", k_view)
    slab = slab_of(k_view, v_view, k_view.dtype)
    tokens, width = positions.shape[0], (heads + 2 * slab.kv_heads) * slab.dim
    parts = 1
    if qkv.dim() == 3:
        parts = qkv.shape[0]
        require(qkv.is_contiguous() and qkv.shape[1:] == (tokens, width) and qkv.dtype is torch.float32,
                "qkv is %s %s; want (P, %d, %d) torch.float32 contiguous", tuple(qkv.shape), qkv.dtype, tokens,
                width)  # fmt: skip
    else:
        require_rows("qkv", qkv, width, k_view.dtype)
        require(qkv.shape[0] == tokens, "qkv has %d rows for %d positions; want as many", qkv.shape[0], tokens)
    require_ints("positions", positions, tokens)
    require_ints("slots_of_token", slots_of_token, tokens)
    rows = positions if rows is None else rows
    require_ints("rows", rows, tokens)
    half = slab.dim // 2
    require(slab.dim % 2 == 0 and cos_sin.dim() == 3 and cos_sin.shape[1:] == (2, half)
            and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous(),
            "cos_sin is %s %s; want (P, 2, %d) torch.float32 contiguous", tuple(cos_sin.shape), cos_sin.dtype,
            half)  # fmt: skip
    q = torch.empty((tokens, heads, slab.dim), dtype=k_view.dtype, device=qkv.device) if out is None else out
    if tokens:
        _rope_store_kernel[(tokens, triton.cdiv(heads + 2 * slab.kv_heads, _HEADS_A_PROGRAM))](
            qkv, cos_sin, positions, slots_of_token, rows, q, k_view, v_view, tokens, slab.slot_stride,
            slab.token_stride, slab.head_stride, HEADS=heads, GROUPS=slab.kv_heads, DIM=slab.dim, HALF=half,
            BLOCK_HALF=power_of_two(half), BLOCK_HEADS=_HEADS_A_PROGRAM, PARTS=parts, INTERLEAVED=interleaved,
            num_warps=4, **early(pdl),
        )  # fmt: skip
    return q
