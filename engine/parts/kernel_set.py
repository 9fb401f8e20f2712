"""The dense operations of a device, as one object: a kernel set.

`torch` is the plain one and the judge; `cpu` runs the C++ kernels of tessera_kernels. A set knows tensors only: no
model, no scheduler, no cache policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from engine.runner.batch import Batch


class Linear(Protocol):
    """y = x W^T + b, rows independent of each other."""

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, in). Returns (N, out); with add_to (N, out) it is updated in place and returned."""


class GatedLinear(Protocol):
    """silu(x W_gate^T) * (x W_up^T)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C). Returns (N, F)."""


class Layer(Protocol):
    """A decoder layer on the residual stream."""

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> object:
        """hidden: (N, C), updated in place."""

    def last(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As __call__, in a model's last layer: only the rows of batch.sample_rows are wanted. Returns them, (R, C)."""


class KernelSet(Protocol):
    """What a device must offer to run a decoder."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> Linear:
        """Prepare (out, in) weights once; the caller drops its copy. wide: float32 comes out, not rounded before."""

    def gated_linear(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...] = ()
    ) -> GatedLinear:
        """Prepare the two (F, C) halves of a gated MLP once; biases: none, or one (F,) each."""

    def head(self, weight: torch.Tensor) -> Linear:
        """Like linear, but (R, V) float32 comes out."""

    def embed(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """table: (V, C); tokens: (N,) int64, each in 0..V-1. Returns a fresh (N, C)."""

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: (N, C); weight: (C,). Returns x / rms(x) * weight, computed in float32."""

    def rope_store(
        self, qkv: torch.Tensor, rope: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """Rotate queries and keys and write keys and values into their slots.

        qkv: (N, (H + 2G) * D). rope: (P, 2, D/2) float32, cosines then sines. k, v: (S, C, G, D) slab views, of which
        only mapped rows may be touched. Returns the rotated queries, (N, H, D).
        """

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: (R, V) float32. Returns (R,) int64: the first of the largest, a NaN above all."""

    def fuse(self, layer: Layer) -> Layer:
        """The layer with fewer launches where this set knows how, else the layer itself; results do not change."""


kernel_sets: Registry[type[KernelSet]] = Registry("kernel set", "engine.parts")
