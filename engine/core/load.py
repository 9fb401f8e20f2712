"""What a step has to do, in the numbers that its time depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.core.plan import Chunk


class Load(NamedTuple):
    """What a step has to do. tokens: all that it runs; cached: tokens that its decodes read; pairs: (query, key) pairs
    of its prompts."""

    tokens: int = 0
    cached: int = 0
    pairs: float = 0.0


def load_of(chunks: Iterable[Chunk]) -> Load:
    """The load of a step's chunks; one of a single token counts as a decode."""
    tokens, cached, pairs = 0, 0, 0.0
    for chunk in chunks:
        tokens += chunk.length
        if chunk.length == 1:
            cached += chunk.start
        else:
            pairs += chunk.length * (chunk.start + chunk.length / 2)
    return Load(tokens, cached, pairs)
