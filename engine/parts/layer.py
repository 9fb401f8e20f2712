"""A decoder layer, one operation at a time: what runs where nothing is fused, and the judge of what is.

The pieces hold kernels, a backend and views of memory; they know neither checkpoints nor the other layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.parts.kernel_set import GatedLinear, KernelSet, Linear
from engine.runner.batch import Batch


@dataclass(slots=True)
class Norm:
    """RMS norm with its weight; see KernelSet.rmsnorm."""

    kernels: KernelSet
    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C). Returns (N, C)."""
        return self.kernels.rmsnorm(x, self.weight, self.eps)


class AttentionPiece(Protocol):
    """One layer's attention over the slabs, plain (Attention) or encoded (engine/scx/attention.py)."""

    def __call__(self, x: torch.Tensor, batch: Batch, add_to: torch.Tensor) -> None:
        """x: (N, C), normed; add_to: (N, C) residual stream, updated in place."""


@dataclass(slots=True)
class Attention:
    """Project, rotate and store, attend, project back: one layer's attention over the slabs."""

    kernels: KernelSet
    backend: AttentionBackend
    qkv: Linear
    out: Linear
    rope: torch.Tensor  # (P, 2, D/2)
    k: torch.Tensor  # (S, C, G, D) slab view of this layer
    v: torch.Tensor
    heads: int
    window: int  # tokens a query may look back, itself included; 0 = all

    def __call__(self, x: torch.Tensor, batch: Batch, add_to: torch.Tensor) -> None:
        """x: (N, C), normed; add_to: (N, C) residual stream, updated in place."""
        q = self.kernels.rope_store(self.qkv(x), self.rope, batch, self.k, self.v, self.heads)  # (N, H, D)
        self.out(self.backend.attend(q, self.k, self.v, batch, self.window), add_to=add_to)


@dataclass(slots=True)
class GatedMlp:
    """silu(gate) * up, then down, added onto the residual stream."""

    gate_up: GatedLinear
    down: Linear

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor) -> None:
        """x: (N, C), normed; add_to: (N, C), updated in place."""
        self.down(self.gate_up(x), add_to=add_to)


@dataclass(slots=True)
class PreNormLayer:
    """Pre-norm attention and gated MLP, each added onto the residual stream."""

    input_norm: Norm
    attention: AttentionPiece
    post_norm: Norm
    mlp: GatedMlp

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> None:
        """hidden: (N, C), updated in place."""
        self.attention(self.input_norm(hidden), batch, add_to=hidden)
        self.mlp(self.post_norm(hidden), add_to=hidden)

    def last(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See kernel_set.Layer."""
        self(hidden, batch)
        return hidden.index_select(0, batch.sample_rows)
