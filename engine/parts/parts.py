"""How a model gets its pieces: the one file that knows kernels, cache and attention backend all exist.

Parts reads the checkpoint once, packs weights for the device, and hands models finished objects. A model asks for
`parts.linear("...")` and never learns what is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.kv.store import KvStore
from engine.loading.spec import ModelSpec
from engine.parts.kernel_set import KernelSet, Layer, Linear
from engine.parts.layer import Attention, AttentionPiece, GatedMlp, Norm, PreNormLayer
from engine.parts.rope import rope_table
from engine.scx.attention import Scx, ScxAttention


class Weights(Protocol):
    """Where tensors come from: a checkpoint, or random ones."""

    def expect(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor of that name. Raises LoadError unless it exists and has that shape."""


class Parts:
    """Builds pieces for one model from one checkpoint on one device.

    Every tensor is asked for with its shape; a missing one or a wrong shape is a LoadError that names it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: Weights,
        kernels: KernelSet,
        backend: AttentionBackend,
        store: KvStore,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008  a constant
        on_tensor: Callable[[], None] = lambda: None,
        scx: Scx | None = None,
    ) -> None:
        self.spec, self.kernels, self.backend, self.store = spec, kernels, backend, store
        self._source, self._dtype, self._on_tensor = source, dtype, on_tensor
        self._rope = rope_table(spec.rope, spec.head_dim, max_model_len, spec.max_positions).to(device)
        self._device, self._scx = device, scx

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        """The named tensor in the engine's dtype."""
        tensor = self._source.expect(name, shape).to(device=self._device, dtype=self._dtype)
        self._on_tensor()
        return tensor

    def embedding(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Token ids (N,) to rows (N, C)."""
        table = self._tensor(f"{name}.weight", self.spec.vocab, self.spec.hidden)
        return lambda tokens: self.kernels.embed(table, tokens)

    def head(self, name: str, *, tied_to: str) -> Linear:
        """Rows (R, C) to float32 logits (R, V); a tied model uses its embedding table."""
        source = tied_to if self.spec.tie else name
        return self.kernels.head(self._tensor(f"{source}.weight", self.spec.vocab, self.spec.hidden))

    def norm(self, name: str) -> Norm:
        """An RMS norm over the model width."""
        return Norm(self.kernels, self._tensor(f"{name}.weight", self.spec.hidden), self.spec.eps)

    def linear(self, name: str, out: int, into: int, *, bias: bool = False) -> Linear:
        """One projection (out, into)."""
        return self.kernels.linear(
            self._tensor(f"{name}.weight", out, into), self._tensor(f"{name}.bias", out) if bias else None
        )

    def attention(self, index: int, name: str) -> AttentionPiece:
        """Layer `index`: the three projections as one product, the output projection, this layer's slabs."""
        spec = self.spec
        rows = {"q_proj": spec.heads, "k_proj": spec.kv_heads, "v_proj": spec.kv_heads}
        rows = {side: heads * spec.head_dim for side, heads in rows.items()}
        weight = torch.cat([self._tensor(f"{name}.{side}.weight", n, spec.hidden) for side, n in rows.items()])
        bias = None
        if spec.qkv_bias:
            bias = torch.cat([self._tensor(f"{name}.{side}.bias", n) for side, n in rows.items()])
        k, v = self.store.layer_views(index)
        scx = self._scx if self._scx is not None and index in self._scx.config.layers else None
        qkv = self.kernels.linear(weight, bias, wide=scx is not None and scx.wide)
        out = self.linear(f"{name}.o_proj", spec.hidden, rows["q_proj"], bias=spec.out_bias)
        window = spec.layer_windows[index] if spec.layer_windows else 0
        if scx is not None:
            return ScxAttention(index, scx, scx.backend or self.backend, qkv, out, k, v, window)
        return Attention(
            kernels=self.kernels,
            backend=self.backend,
            qkv=qkv,
            out=out,
            rope=self._rope,
            k=k,
            v=v,
            heads=spec.heads,
            window=window,
        )

    def gated_mlp(self, name: str) -> GatedMlp:
        """The three products of a gated MLP."""
        ffn, hidden, bias = self.spec.ffn, self.spec.hidden, self.spec.mlp_bias
        down = self.linear(f"{name}.down_proj", hidden, ffn, bias=bias)
        gate, up = (self._tensor(f"{name}.{side}.weight", ffn, hidden) for side in ("gate_proj", "up_proj"))
        if not bias:
            return GatedMlp(self.kernels.gated_linear(gate, up), down)
        biases = tuple(self._tensor(f"{name}.{side}.bias", ffn) for side in ("gate_proj", "up_proj"))
        return GatedMlp(self.kernels.gated_linear(gate, up, biases), down)

    def pre_norm_layer(
        self, *, input_norm: Norm, attention: AttentionPiece, post_norm: Norm, mlp: GatedMlp
    ) -> Layer:
        """A layer of these pieces, fused where the kernels can."""
        return self.kernels.fuse(PreNormLayer(input_norm, attention, post_norm, mlp))
