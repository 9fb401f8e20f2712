"""Llama and what shares its block: Llama 2 and 3, SmolLM2, TinyLlama, Yi.

It names the pieces of a checkpoint and their order. It does not know which kernels run, where the cache lives, or
whether a layer is encoded or carries an adapter: Parts decided that.
"""

from __future__ import annotations

import torch

from engine.models import models
from engine.parts.parts import Parts
from engine.runner.batch import Batch


class LlamaLayer:
    """Pre-norm attention and gated MLP, each added onto the residual stream in place."""

    def __init__(self, parts: Parts, index: int) -> None:
        name = f"model.layers.{index}"
        self.input_norm = parts.norm(f"{name}.input_layernorm")
        self.attention = parts.attention(index, f"{name}.self_attn")
        self.post_norm = parts.norm(f"{name}.post_attention_layernorm")
        self.mlp = parts.gated_mlp(f"{name}.mlp")

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> None:
        """hidden: (N, C), updated in place."""
        self.attention(self.input_norm(hidden), batch, add_to=hidden)
        self.mlp(self.post_norm(hidden), add_to=hidden)


@models.register("LlamaForCausalLM")
class Llama:
    """The decoder of `LlamaForCausalLM` checkpoints."""

    def __init__(self, parts: Parts) -> None:
        self.embed = parts.embedding("model.embed_tokens")
        self.layers = [LlamaLayer(parts, i) for i in range(parts.spec.layers)]
        self.norm = parts.norm("model.norm")
        self.head = parts.head("lm_head", tied_to="model.embed_tokens")

    def __call__(self, batch: Batch) -> torch.Tensor:
        """batch: N tokens of B sequences. Returns (R, V) float32 logits of batch.sample_rows."""
        hidden = self.embed(batch.tokens)  # (N, C)
        for layer in self.layers:
            layer(hidden, batch)
        return self.head(self.norm(hidden[batch.sample_rows]))  # (R, V)
