"""One file is one model, found by the architecture name of its checkpoints; built from Parts only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from engine.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from engine.parts.parts import Parts
    from engine.runner.batch import Batch


class Model(Protocol):
    """A decoder: tokens in, logits of the sampled rows out."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Run one step. Returns (R, V) float32 logits, one row for each of batch.sample_rows."""


models: Registry[Callable[[Parts], Model]] = Registry("architecture", "engine.models")
