"""Rotary position embedding of a step's q and k, with k and v stored into the KV slabs.

It knows nothing of models or pages: angles come as a table, places as (slot, position).
"""

from __future__ import annotations

import torch

from tessera_kernels.checks import kv_view, require, require_ints, require_rows
from tessera_kernels.native import OPS


def rope_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots_of_token: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    heads: int,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotates q and k, writes k and v at [slot, position], returns q (N, H, D).

    qkv (N, (H + 2G) * D); cos_sin (P, 2, D/2) fp32; positions, slots_of_token (N,) int32; k_view, v_view
    (S, C, G, D). Pairs are (i, i + D/2), or (2i, 2i + 1) when `interleaved`. Angles multiply in fp32 and the result
    is rounded once. Raises ValueError for a wrong shape, dtype or stride, IndexError for a place outside the views.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    kv_heads, dim = k_view.shape[2], k_view.shape[3]
    ops = OPS.get(qkv.dtype)
    if ops is None:
        return rope_store_reference(qkv, cos_sin, positions, slots_of_token, k_view, v_view, heads, interleaved)
    tokens = positions.shape[0]
    require_rows("qkv", qkv, (heads + 2 * kv_heads) * dim, k_view.dtype)
    require(qkv.shape[0] == tokens, "qkv has %d rows for %d positions; want as many", qkv.shape[0], tokens)
    require_ints("positions", positions, tokens)
    require_ints("slots_of_token", slots_of_token, tokens)
    require(dim % 2 == 0 and cos_sin.dim() == 3 and cos_sin.shape[1:] == (2, dim // 2)
            and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous(),
            "cos_sin is %s %s; want (P, 2, %d) torch.float32 contiguous", tuple(cos_sin.shape), cos_sin.dtype,
            dim // 2)  # fmt: skip
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype)
    ops.rope_store(qkv.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), slots_of_token.data_ptr(), q.data_ptr(),
                   kv_view(k_view, v_view, qkv.dtype), tokens, heads, kv_heads, dim, interleaved,
                   cos_sin.shape[0])  # fmt: skip
    return q


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (N, heads, D) rotated by cos, sin (N, 1, D/2)."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_store_reference(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots_of_token: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    heads: int,
    interleaved: bool = False,
) -> torch.Tensor:
    """The same by torch; computes in the wider of fp32 and qkv's dtype."""
    kv_heads, dim = k_view.shape[2], k_view.shape[3]
    split = qkv.view(-1, heads + 2 * kv_heads, dim)
    wide = split if qkv.dtype is torch.float64 else split.float()
    angles = cos_sin[positions.long()].to(wide.dtype)  # (N, 2, D/2)
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    rotated = rotate_reference(wide[:, : heads + kv_heads], cos, sin, interleaved).to(qkv.dtype)
    # index_put_ writes only the rows named, so unmapped rows of the views are never touched
    k_view[slots_of_token.long(), positions.long()] = rotated[:, heads:]
    v_view[slots_of_token.long(), positions.long()] = split[:, heads + kv_heads :]
    return rotated[:, :heads].contiguous()
