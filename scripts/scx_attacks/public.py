"""The model as everybody has it: weights, plain forward pass, and the rows that each vocabulary token would write.

Written out in plain torch and float32 so that attacks share no code with the engine they look at. It knows no scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from engine.loading.spec import ModelSpec, read_config
from engine.loading.weights import open_weights
from engine.parts.rope import rope_table

MAX_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """What one layer writes. q: (n, H, D); k, v: (n, G, D); q and k before rotation where a method says so."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, float32; qkv is (H + 2G) * D rows."""

    norm: torch.Tensor
    qkv: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    post: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def rotate(x: torch.Tensor, rope: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Half-split rotary. x: (n, heads, D); rope: (n or 1, 2, D/2), cosines then sines; back: undo it."""
    cos, sin = rope[:, None, 0], rope[:, None, 1]
    sin = -sin if back else sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PublicModel:
    """A Llama- or Qwen2-like checkpoint for attackers. layers: how many to load (attacks need few)."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.spec: ModelSpec = read_config(folder)
        spec = self.spec
        self.rope = rope_table(spec.rope, spec.head_dim, MAX_POSITIONS, spec.max_positions)  # (P, 2, D/2)
        with open_weights(folder) as source:
            self.embed = source.get("model.embed_tokens.weight").float()  # (V, C)
            self.layers = [self._load(source, index) for index in range(min(layers, spec.layers))]
        self._first = self.project(self.embed, 0)

    def _load(self, source: object, index: int) -> _Layer:
        name = f"model.layers.{index}"
        get = lambda leaf: source.get(f"{name}.{leaf}").float()  # type: ignore[attr-defined]  # noqa: E731
        sides = [f"self_attn.{side}_proj" for side in "qkv"]
        bias = torch.cat([get(f"{side}.bias") for side in sides]) if self.spec.qkv_bias else None
        return _Layer(
            norm=get("input_layernorm.weight"), qkv=torch.cat([get(f"{side}.weight") for side in sides]), bias=bias,
            out=get("self_attn.o_proj.weight"), post=get("post_attention_layernorm.weight"),
            gate=get("mlp.gate_proj.weight"), up=get("mlp.up_proj.weight"), down=get("mlp.down_proj.weight"),
        )  # fmt: skip

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.embed.shape[0]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.spec.eps) * weight

    def project(self, hidden: torch.Tensor, layer: int) -> Rows:
        """The rows of a residual stream (n, C) at `layer`, queries and keys not yet rotated."""
        spec, w = self.spec, self.layers[layer]
        qkv = functional.linear(self._norm(hidden, w.norm), w.qkv, w.bias)
        q, k, v = qkv.split([spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim],
                            dim=-1)  # fmt: skip
        return Rows(*(side.unflatten(-1, (-1, spec.head_dim)) for side in (q, k, v)))

    def first_rows(self) -> Rows:
        """Layer 0's rows of every token of the vocabulary, not rotated: (V, heads, D) each."""
        return self._first

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, layer: int) -> torch.Tensor:
        """The residual stream behind a layer. hidden: (n, C); attended: (n, H * D)."""
        w = self.layers[layer]
        hidden = hidden + attended @ w.out.T
        x = self._norm(hidden, w.post)
        return hidden + (functional.silu(x @ w.gate.T) * (x @ w.up.T)) @ w.down.T

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of a sequence over itself. q: (n, H, D), k, v: (n, G, D), rotated; hidden: (n, n) True = masked."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).flatten(1)

    def forward(self, tokens: torch.Tensor) -> tuple[list[Rows], list[torch.Tensor]]:
        """Rows (rotated) and residual streams (n, C) at the input of each loaded layer, for tokens (n,)."""
        hidden = self.embed[tokens]
        n = len(tokens)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        rows, streams = [], []
        for layer in range(len(self.layers)):
            streams.append(hidden)
            plain = self.project(hidden, layer)
            rope = self.rope[:n]
            rows.append(Rows(rotate(plain.q, rope), rotate(plain.k, rope), plain.v))
            if layer + 1 < len(self.layers):
                hidden = self.finish(hidden, self.attend(rows[-1].q, rows[-1].k, plain.v, future), layer)
        return rows, streams

    def candidates(self, past: list[Rows], position: int, tokens: torch.Tensor, layer: int) -> Rows:
        """Rows (rotated) that each of `tokens` (m,) would write at `layer` if it stood at `position` behind `past`.

        past: forward()'s rows, of which those below `position` are used.
        """
        hidden = self.embed[tokens]
        rope = self.rope[position : position + 1]
        for index in range(layer + 1):
            plain = self.project(hidden, index)
            q, k = rotate(plain.q, rope), rotate(plain.k, rope)
            if index < layer:
                hidden = self.finish(hidden, self._attend_past(q, k, plain.v, past[index], position), index)
        return Rows(q, k, plain.v)

    def _attend_past(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: Rows, position: int
    ) -> torch.Tensor:
        """Each candidate over the shared past and itself. q: (m, H, D); k, v: (m, G, D). Returns (m, H * D)."""
        group = q.shape[1] // k.shape[1]
        spread = lambda x: x.repeat_interleave(group, 1)  # noqa: E731
        scale = q.shape[-1] ** -0.5
        before = torch.einsum("mhd,jhd->mhj", q, spread(past.k[:position])) * scale
        own = (q * spread(k)).sum(-1, keepdim=True) * scale  # (m, H, 1)
        weight = torch.cat([before, own], dim=-1).softmax(-1)
        out = torch.einsum("mhj,jhd->mhd", weight[..., :-1], spread(past.v[:position]))
        return (out + weight[..., -1:] * spread(v)).flatten(1)
