"""Llama and what shares its block: Llama 2 and 3, SmolLM2, TinyLlama, Yi.

It names the pieces of a checkpoint and their order. It does not know which kernels run, where the cache lives, or
whether a layer is encoded or carries an adapter: Parts decided that.
"""

from __future__ import annotations

import torch

from engine.models import models
from engine.parts.kernel_set import Layer
from engine.parts.parts import Parts
from engine.runner.batch import Batch


def llama_layer(parts: Parts, index: int) -> Layer:
    """Layer `index`: pre-norm attention and gated MLP under Llama's names."""
    name = f"model.layers.{index}"
    return parts.pre_norm_layer(
        input_norm=parts.norm(f"{name}.input_layernorm"),
        attention=parts.attention(index, f"{name}.self_attn"),
        post_norm=parts.norm(f"{name}.post_attention_layernorm"),
        mlp=parts.gated_mlp(f"{name}.mlp"),
    )


@models.register("LlamaForCausalLM")
@models.register("LlamaSCXForCausalLM")
class Llama:
    """The decoder of `LlamaForCausalLM` checkpoints."""

    def __init__(self, parts: Parts) -> None:
        self.embed = parts.embedding("model.embed_tokens")
        self.layers = [llama_layer(parts, i) for i in range(parts.spec.layers)]
        self.norm = parts.norm("model.norm")
        self.head = parts.head("lm_head", tied_to="model.embed_tokens")

    def __call__(self, batch: Batch) -> torch.Tensor:
        """batch: N tokens of B sequences. Returns (R, V) float32 logits of batch.sample_rows."""
        hidden = self.embed(batch.tokens)  # (N, C)
        for layer in self.layers[:-1]:
            layer(hidden, batch)
        return self.logits(self.layers[-1].last(hidden, batch))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: (R, C) behind the last layer. Returns (R, V) float32 logits."""
        return self.head(self.norm(rows))
