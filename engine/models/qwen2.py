"""Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections."""

from __future__ import annotations

from engine.models import models
from engine.models.llama import Llama


@models.register("Qwen2ForCausalLM")
@models.register("Qwen2SCXForCausalLM")
class Qwen2(Llama):
    """The decoder of `Qwen2ForCausalLM` checkpoints; the specification says which projections have biases."""
