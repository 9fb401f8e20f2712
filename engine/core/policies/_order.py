"""What an order of prompts is, and the one by length.

An order knows who waits, since when, and what is left; it knows no memory, slots or clocks. A more urgent priority
always comes first.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.core.sequence import Sequence

AGED_TOKENS_S = 10_000  # tokens by which a prompt counts as shorter for each second it waited


class PromptCost(NamedTuple):
    """What prompts take in steps as they are now. token_s: seconds a token, its share of everything else in the step
    included; pair_s: seconds more for each (query, key) pair."""

    token_s: float
    pair_s: float

    def seconds(self, tokens: int, computed: int) -> float:
        """Of so many tokens behind those that are computed."""
        return tokens * (self.token_s + self.pair_s * (computed + tokens / 2))


class PromptOrder(Protocol):
    """An order of prompts, asked once a step."""

    def line(self, prompts: list[Sequence], now_s: float, cost: PromptCost | None, most: int) -> list[Sequence]:
        """The prompts, the first to run first; those beyond the first `most` tokens in any order. cost: None if it is
        not known."""

    def started(self) -> None:
        """A prompt was admitted, for the first time."""


class Shortest:
    """Fewest tokens left first; who waited counts as less, so none starves."""

    def line(self, prompts: list[Sequence], now_s: float, cost: PromptCost | None, most: int) -> list[Sequence]:
        """See PromptOrder."""

        def place(sequence: Sequence) -> tuple[int, float]:
            return sequence.request.priority, sequence.left - AGED_TOKENS_S * (now_s - sequence.arrival_s)

        return sorted(prompts, key=place)

    def started(self) -> None:
        """Nothing to count."""
