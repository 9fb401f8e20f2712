"""Which prompts get a step's tokens first, where it is not the oldest.

Both orders know who waits, since when, and how many tokens are left; neither knows memory, slots or clocks. A more
urgent priority always comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from engine.core.errors import ConfigError
from engine.core.sequence import Sequence

AGED_TOKENS_S = 10_000  # tokens by which a prompt counts as shorter for each second it waited
PUT_OFF_SHARE = 0.01  # of the prompts that start, so many may be put off: the target is one for the other 99 %
PUT_OFF_MOST = 5.0  # at once, however many started before
PATIENCE = 8  # a prompt that was put off is due after so many targets
KEPT_SPEED = 0.7  # part of today's speed that is counted on: those who start will decode, and others come


class PromptOrder(Protocol):
    """An order of prompts, asked once a step."""

    def line(self, prompts: list[Sequence], now_s: float, tokens_s: float, most: int) -> list[Sequence]:
        """The prompts, the first to run first; those beyond the first `most` tokens in any order. tokens_s: prompt
        tokens that a second runs at this load, 0 if unknown."""

    def started(self) -> None:
        """A prompt was admitted."""


class Shortest:
    """Fewest tokens left first; who waited counts as less, so none starves."""

    def line(self, prompts: list[Sequence], now_s: float, tokens_s: float, most: int) -> list[Sequence]:
        """See PromptOrder."""

        def place(sequence: Sequence) -> tuple[int, float]:
            return sequence.request.priority, sequence.left - AGED_TOKENS_S * (now_s - sequence.arrival_s)

        return sorted(prompts, key=place)

    def started(self) -> None:
        """Nothing to count."""


@dataclass(slots=True)
class Deadline:
    """First tokens within target_s for as many as can be: the shortest goes first while all others stay in time.

    When, in the order of deadlines, somebody would come late, the largest prompt up to there is put off, which leaves
    the fewest late (Moore, An n Job, One Machine Sequencing Algorithm for Minimizing the Number of Late Jobs,
    Management Science 15, 1968); but no more than PUT_OFF_SHARE of all. Beyond that the oldest goes first. A prompt
    put off, and one that takes longer than the target by itself, is due after PATIENCE targets, so none starves.
    Raises ConfigError naming value and range.
    """

    target_s: float
    _allowance: float = 0.0  # prompts that may still be put off
    _put_off: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not 0 < self.target_s < math.inf:
            raise ConfigError(f"ttft target_s={self.target_s} is not above 0 and finite")

    def started(self) -> None:
        """One more of whom a share may be put off."""
        self._allowance = min(PUT_OFF_MOST, self._allowance + PUT_OFF_SHARE)

    def line(self, prompts: list[Sequence], now_s: float, tokens_s: float, most: int) -> list[Sequence]:
        """See PromptOrder."""
        if tokens_s <= 0:
            return Shortest().line(prompts, now_s, tokens_s, most)
        speed = KEPT_SPEED * tokens_s
        if self._put_off:
            self._put_off.intersection_update([sequence.seq_id for sequence in prompts])
        while True:
            line = sorted([(sequence.request.priority, self._due_s(sequence, speed), sequence) for sequence in prompts],
                          key=lambda place: place[:2])  # fmt: skip
            largest = self._to_put_off(line, now_s, speed) if self._allowance >= 1 else None
            if largest is None:
                return _shortest_in_time(line, now_s, speed, most)
            self._allowance -= 1
            self._put_off.add(largest.seq_id)

    def _due_s(self, sequence: Sequence, speed: float) -> float:
        """When its first token is due; a request that was started anew had its first token, and is held up."""
        if sequence.outputs:
            return -math.inf
        return sequence.arrival_s + self.target_s * (PATIENCE if self._patient(sequence, speed) else 1)

    def _patient(self, sequence: Sequence, speed: float) -> bool:
        return sequence.seq_id in self._put_off or sequence.known > self.target_s * speed

    def _to_put_off(self, line: list[tuple[int, float, Sequence]], now_s: float, speed: float) -> Sequence | None:
        """The largest up to the first who would be late, if there is one."""
        largest: Sequence | None = None
        for _, due_s, sequence in line:
            now_s += sequence.left / speed
            if sequence.outputs or self._patient(sequence, speed):
                continue
            if largest is None or sequence.left > largest.left:
                largest = sequence
            if now_s > due_s:
                return largest
        return None


def _shortest_in_time(line: list[tuple[int, float, Sequence]], now_s: float, speed: float, most: int) -> list[Sequence]:
    """The line by deadlines with the shortest called forward, as long as it makes nobody late who would not be."""
    first: list[Sequence] = []
    while line and most > 0:
        best, end_s, spare_s = 0, now_s, math.inf  # spare_s: by which those ahead may be held up
        for i, (priority, due_s, sequence) in enumerate(line):
            took_s = sequence.left / speed
            if took_s <= spare_s and (priority, sequence.left) < (line[best][0], line[best][2].left):
                best = i
            end_s += took_s
            spare_s = min(spare_s, due_s - end_s)
        sequence = line.pop(best)[2]
        first.append(sequence)
        most -= sequence.left
        now_s += sequence.left / speed
    return first + [sequence for _, _, sequence in line]
