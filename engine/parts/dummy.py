"""Random weights of any shape, made on the device: for measuring speed without a checkpoint. They say nothing.

Values are seeded by the tensor's name, so that two engines of one shape compute the same. All tensors, norms among
them, are uniform between -0.001 and 0.001, as those of vLLM's dummy format are: a GPU held by its power runs some
values faster than others (an H200 these 0.7 % faster than normal ones of 0.02 with norms of one), and a comparison
should not turn on that.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType

import torch

LARGEST = 1e-3


class DummyWeights:
    """A WeightSource of random tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def names(self) -> list[str]:
        """None: whatever is asked for exists."""
        return []

    def expect(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A (shape) bfloat16 tensor on the device."""
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        made = torch.empty(tuple(shape), device=self._device, dtype=torch.bfloat16)
        return made.uniform_(-LARGEST, LARGEST, generator=generator)

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
