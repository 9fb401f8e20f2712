"""How long a step lasts, learnt from the steps that were: a fixed part, and one for each of three kinds of work.

Recursive least squares with forgetting (Ljung, System Identification, section 11.2). Products cost by token, decodes by
the cached tokens that they read, prompts by the pairs of tokens that attend: a step's length by tokens alone would be
wrong by a tenth. The loads' products are kept, not their inverse, in which rounding would grow step by step. It knows
neither clocks nor sequences, so the same times give the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import mul

from engine.core.load import Load

FADE = 0.98  # weight of a step for each newer one
SURPRISE = 1.5  # a step is taken to be at most so many times as long, or short, as predicted: stalls teach nothing
LEARNT = 8  # steps after which a prediction can be surprised
FIRST = (0.01, 0.001, 0.1, 0.1)  # what is known at first of each part: nothing, so it costs nothing
LEAST = 1e-3  # what is known of everything at least: what the steps seen do not tell stays as it was
SCALES = (1.0, 1e-3, 1e-5, 1e-6)  # of 1, tokens, cached tokens, pairs: a step of a full GPU is about 1 of each


def _dot(a: Iterable[float], b: Iterable[float]) -> float:
    return sum(map(mul, a, b), 0.0)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix x = right; the matrix is symmetric and positive definite, so no row need be exchanged."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, row in enumerate(rows):
        for below in rows[i + 1 :]:
            factor = below[i] / row[i]
            for j in range(i + 1, len(row)):
                below[j] -= factor * row[j]
    solved: list[float] = []  # the last first
    for i in reversed(range(len(rows))):
        known = _dot(rows[i][-2:i:-1], solved)
        solved.append((rows[i][-1] - known) / rows[i][i])
    return solved[::-1]


@dataclass(slots=True)
class StepTime:
    """Seconds of a step as a sum over its load. Each coefficient is of a scaled part of it (SCALES)."""

    seen: int = 0
    _weights: list[float] = field(default_factory=lambda: [0.0] * 4)
    _known: list[list[float]] = field(
        default_factory=lambda: [[FIRST[i] if i == j else 0.0 for j in range(4)] for i in range(4)]
    )  # sum of the outer products of the loads seen, faded

    def observe(self, load: Load, seconds: float) -> None:
        """A step of this load took so long."""
        x = [scale * part for scale, part in zip(SCALES, (1, *load), strict=True)]
        expected = _dot(self._weights, x)
        if self.seen >= LEARNT and expected > 0:
            seconds = min(max(seconds, expected / SURPRISE), expected * SURPRISE)
        self.seen += 1
        for i, row in enumerate(self._known):
            row[:] = [FADE * known + x[i] * part for known, part in zip(row, x, strict=True)]
            row[i] += (1 - FADE) * LEAST
        gain = _solved(self._known, x)
        self._weights = [w + g * (seconds - expected) for w, g in zip(self._weights, gain, strict=True)]

    def predict(self, load: Load) -> float:
        """Seconds of a step; 0 before any was seen. Of parts that always came together it knows the sum alone, and one
        of them may be negative."""
        return max(0.0, _dot(self._weights, map(mul, SCALES, (1, *load))))

    @property
    def token_s(self) -> float:
        """Seconds that a token more takes, attention left out; 0 where nothing is known."""
        return max(0.0, self._weights[1] * SCALES[1])

    @property
    def pair_s(self) -> float:
        """Seconds that a (query, key) pair more of a prompt takes; 0 where nothing is known."""
        return max(0.0, self._weights[3] * SCALES[3])

    def tokens_within(self, limit_s: float, decodes: Load, context: int) -> float:
        """Prompt tokens that fit into limit_s beside the decodes, `context` cached tokens before the first of them; 0
        where the decodes alone take longer, infinite where nothing is known that would limit them."""
        pair_s = self.pair_s
        left_s, each_s = max(0.0, limit_s - self.predict(decodes)), self.token_s + pair_s * context
        if each_s == 0 and pair_s == 0:
            return math.inf
        if left_s == 0:
            return 0.0
        return 2 * left_s / (each_s + math.sqrt(each_s * each_s + 2 * pair_s * left_s))
