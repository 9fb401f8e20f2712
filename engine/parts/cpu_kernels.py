"""The CPU's kernel set: the C++ kernels of tessera_kernels, weights packed once, every bit independent of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.attention.cpu_vattn import CpuVattn
from engine.parts.kernel_set import Layer, kernel_sets
from engine.parts.layer import Attention, PreNormLayer
from engine.runner.batch import Batch
from tessera_kernels.argmax import argmax
from tessera_kernels.decoder_layer import DecoderLayer, LayerWeights
from tessera_kernels.embed import embed
from tessera_kernels.linear import PackedLinear
from tessera_kernels.rmsnorm import rmsnorm
from tessera_kernels.rope_store import rope_store


class CpuLinear:
    """x W^T + b from packed panels."""

    def __init__(self, packed: PackedLinear) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, in). See Linear."""
        return self.packed(x) if add_to is None else self.packed.add_to(x, add_to)


class CpuGatedLinear:
    """silu(gate) * up, one product and its epilogue."""

    def __init__(self, packed: PackedLinear) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C). Returns (N, F)."""
        return self.packed.silu_mul(x)


class CpuHead:
    """Rows to float32: logits, and what is rounded elsewhere."""

    def __init__(self, packed: PackedLinear) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (R, C). Returns (R, V) float32."""
        assert add_to is None
        return self.packed.logits(x)


@dataclass(frozen=True, slots=True)
class CpuLayer:
    """A whole decoder layer as one call of the C++ kernels."""

    fused: Callable[[torch.Tensor, Any], object]  # a batch is what it takes of one

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> None:
        """See Layer."""
        self.fused(hidden, batch)

    def last(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See Layer."""
        self.fused(hidden, batch)
        return hidden.index_select(0, batch.sample_rows)


@kernel_sets.register("cpu")
class CpuKernels:
    """KernelSet over tessera_kernels, bf16 and fp32."""

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False
    ) -> CpuLinear | CpuHead:
        """See KernelSet."""
        packed = PackedLinear(weight, bias)
        return CpuHead(packed) if wide else CpuLinear(packed)

    def gated_linear(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...] = ()
    ) -> CpuGatedLinear:
        """See KernelSet."""
        bias = torch.cat(biases) if biases else None
        return CpuGatedLinear(PackedLinear(torch.cat([gate, up]), bias, gate_up=True))

    def head(self, weight: torch.Tensor) -> CpuHead:
        """See KernelSet."""
        return CpuHead(PackedLinear(weight))

    def embed(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        return embed(table, tokens)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See KernelSet."""
        return rmsnorm(x, weight, eps)

    def rope_store(
        self, qkv: torch.Tensor, rope: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """See KernelSet."""
        return rope_store(qkv, rope, batch.positions, batch.token_slots, k, v, heads)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        return argmax(logits)

    def fuse(self, layer: Layer) -> Layer:
        """See KernelSet: one call a layer, bitwise equal to its steps, where attention runs on these kernels too."""
        if not (isinstance(layer, PreNormLayer) and isinstance(layer.attention, Attention)):
            return layer
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(attention.backend, CpuVattn):
            return layer
        weights = LayerWeights(
            input_norm=layer.input_norm.weight,
            qkv=_packed(attention.qkv),
            attn_out=_packed(attention.out),
            post_norm=layer.post_norm.weight,
            gate_up=_packed(mlp.gate_up),
            down=_packed(mlp.down),
        )
        fused = DecoderLayer(
            weights,
            attention.rope,
            attention.k,
            attention.v,
            attention.heads,
            eps=layer.input_norm.eps,
            scale=attention.backend.scale,
            window=attention.window,
        )
        return CpuLayer(fused)


def _packed(piece: object) -> PackedLinear:
    """The packed weights behind a piece that this kernel set made."""
    assert isinstance(piece, CpuLinear | CpuGatedLinear)
    return piece.packed
