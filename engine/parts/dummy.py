"""Random weights of any shape, made on the device: for measuring speed without a checkpoint. They say nothing.

Values are small and seeded by the tensor's name, so that two engines of one shape compute the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType

import torch

SCALE = 0.02


class DummyWeights:
    """A WeightSource of random tensors. Norm weights are ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def names(self) -> list[str]:
        """None: whatever is asked for exists."""
        return []

    def expect(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A (shape) bfloat16 tensor on the device."""
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(tuple(shape), device=self._device, dtype=torch.bfloat16)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        made = torch.empty(tuple(shape), device=self._device, dtype=torch.bfloat16)
        return made.normal_(0.0, SCALE, generator=generator)

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> DummyWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        """Nothing to close."""


def dummy_weights(device: torch.device) -> DummyWeights:
    """See DummyWeights."""
    return DummyWeights(device)
