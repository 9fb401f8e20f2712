"""The plain kernel set: PyTorch operations, any device and dtype; it judges the fast ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.parts.kernel_set import Layer, kernel_sets
from engine.runner.batch import Batch

# PyTorch's CPU products change their summation order below this many rows, so fewer rows are padded up to it:
# a token's values then do not depend on how many others share its step.
_MIN_ROWS = 16


class TorchLinear:
    """x W^T + b on PyTorch, small batches padded to a fixed number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, float_out: bool = False) -> None:
        self.weight, self.bias, self.float_out = weight.contiguous(), bias, float_out

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, in). See Linear."""
        rows = x.shape[0]
        if x.device.type == "cpu" and rows < _MIN_ROWS:
            x = F.pad(x, (0, 0, 0, _MIN_ROWS - rows))
        y = F.linear(x.to(self.weight.dtype), self.weight, self.bias)[:rows]  # (N, out)
        if self.float_out:
            y = y.float()
        return y if add_to is None else add_to.add_(y)


class TorchGatedLinear:
    """silu(gate) * up with both products in one."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...]) -> None:
        self.gate_up = TorchLinear(torch.cat([gate, up]), torch.cat(biases) if biases else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C). Returns (N, F)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the half-split kind. x: (N, heads, D); cos, sin: (N, 1, D/2) float32. Same shape, dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@kernel_sets.register("torch")
class TorchKernels:
    """KernelSet over plain PyTorch."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> TorchLinear:
        """See KernelSet."""
        if wide:  # PyTorch's products come in the type of what goes in
            weight, bias = weight.float(), None if bias is None else bias.float()
        return TorchLinear(weight, bias)

    def gated_linear(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...] = ()
    ) -> TorchGatedLinear:
        """See KernelSet."""
        return TorchGatedLinear(gate, up, biases)

    def head(self, weight: torch.Tensor) -> TorchLinear:
        """See KernelSet."""
        return TorchLinear(weight, None, float_out=True)

    def embed(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        return F.embedding(tokens, table)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See KernelSet."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (scaled * weight.float()).to(x.dtype)

    def rope_store(
        self, qkv: torch.Tensor, rope: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """See KernelSet."""
        groups, head_dim = k.shape[2:]
        q, new_k, new_v = qkv.view(-1, heads + 2 * groups, head_dim).split([heads, groups, groups], dim=1)
        cos, sin = rope[batch.positions.long()].unsqueeze(2).unbind(1)  # each (N, 1, D/2)
        slots, rows = batch.places
        where = (slots.long(), rows.long())
        k[where] = rotate(new_k, cos, sin)
        v[where] = new_v
        return rotate(q, cos, sin)  # (N, H, D)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        return logits.argmax(dim=-1)

    def fuse(self, layer: Layer) -> Layer:
        """See KernelSet: every step stays its own."""
        return layer
