"""Causal attention of a ragged batch over KV slabs: prefill chunks and decodes together, grouped query heads.

It knows slots as rows of a strided view and nothing of pages. Rows at or past a sequence's kv_len are never touched:
they may be unmapped.
"""

from __future__ import annotations

import torch

from tessera_kernels.checks import kv_view, require, require_ints
from tessera_kernels.native import OPS

MAX_HEAD_DIM = 256


def native_head_dim(head_dim: int) -> bool:
    """Whether the C++ kernel takes heads of this size; others run on the reference."""
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % 16 == 0


def attention(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    slots: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """softmax(scale * q k^T) v -> (N, H * D).

    q (N, H, D); k_view, v_view (S, C, G, D); slots, kv_lens (B,) and q_starts (B + 1,) int32. Query i of sequence b
    (rows q_starts[b]..q_starts[b+1]) sits at position kv_lens[b] - q_len + i and sees keys up to its own position,
    the last `window` of them when window > 0. Sums are fp32. A row's bits depend only on its query and its keys.
    Raises ValueError for a wrong shape, dtype or stride, IndexError for a length or slot outside the views.
    Source: online softmax as in FlashAttention (Dao et al. 2022, arXiv:2205.14135); differs: blocks sit at absolute
    positions, so that chunking cannot change the arithmetic.
    """
    dim = q.shape[-1]
    ops = OPS.get(q.dtype)
    if ops is None or not native_head_dim(dim):
        return attention_reference(q, k_view, v_view, slots, q_starts, kv_lens, scale, window)
    sequences = slots.shape[0]
    require_ints("slots", slots, sequences)
    require_ints("kv_lens", kv_lens, sequences)
    require_ints("q_starts", q_starts, sequences + 1)
    tokens, heads, _ = q.shape
    kv_heads = k_view.shape[2]
    require(q.is_contiguous() and k_view.shape[3] == dim and heads % kv_heads == 0,
            "q is %s with strides %s for %d kv heads of %d; want (N, H, %d) contiguous, H a multiple of %d",
            tuple(q.shape), q.stride(), kv_heads, k_view.shape[3], k_view.shape[3], kv_heads)  # fmt: skip
    require(window >= 0, "window=%d is negative; 0 means no window", window)
    out = torch.empty((tokens, heads * dim), dtype=q.dtype)
    ops.attention(q.data_ptr(), out.data_ptr(), kv_view(k_view, v_view, q.dtype), slots.data_ptr(),
                  q_starts.data_ptr(), kv_lens.data_ptr(), sequences, heads, kv_heads, dim, scale, window,
                  tokens)  # fmt: skip
    return out


def attention_reference(
    q: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    slots: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same by torch, one sequence at a time; computes in the wider of fp32 and q's dtype."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], k_view.shape[2]
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = torch.empty((q.shape[0], heads, dim), dtype=q.dtype)
    starts = q_starts.tolist()
    for b, (slot, kv_len) in enumerate(zip(slots.tolist(), kv_lens.tolist(), strict=True)):
        first, last = starts[b], starts[b + 1]
        k = k_view[slot, :kv_len].to(wide).repeat_interleave(heads // kv_heads, dim=1)  # (T, H, D)
        v = v_view[slot, :kv_len].to(wide).repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].to(wide), k) * scale
        position = torch.arange(kv_len - (last - first), kv_len)[:, None]
        key = torch.arange(kv_len)[None]
        hidden = key > position
        if window > 0:
            hidden |= key <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out.view(-1, heads * dim)
