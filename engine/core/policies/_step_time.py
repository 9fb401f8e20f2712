"""How long a step lasts, learnt from the steps that were: a fixed part, and one for each of three kinds of work.

Recursive least squares with forgetting (Ljung, System Identification, section 11.2). Products cost by token, decodes by
the cached tokens that they read, prompts by the pairs of tokens that attend: a step's length by tokens alone would be
wrong by a tenth. It knows neither clocks nor sequences, so the same times give the same predictions.
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
MOST_DOUBT = 1e4  # sum of the variances; without an end they grow for what the steps seen do not tell
SCALES = (1.0, 1e-3, 1e-5, 1e-6)  # of 1, tokens, cached tokens, pairs: a step of a full GPU is about 1 of each


def _dot(a: Iterable[float], b: Iterable[float]) -> float:
    return sum(map(mul, a, b), 0.0)


@dataclass(slots=True)
class StepTime:
    """Seconds of a step as a sum over its load. Each coefficient is of a scaled part of it (SCALES)."""

    seen: int = 0
    _weights: list[float] = field(default_factory=lambda: [0.0] * 4)
    _doubts: list[list[float]] = field(
        default_factory=lambda: [[variance if i == j else 0.0 for j in range(4)]
                                 for i, variance in enumerate((100.0, 1000.0, 10.0, 10.0))]
    )  # fmt: skip

    def observe(self, load: Load, seconds: float) -> None:
        """A step of this load took so long."""
        x = [scale * part for scale, part in zip(SCALES, (1, *load), strict=True)]
        expected = _dot(self._weights, x)
        if self.seen >= LEARNT and expected > 0:
            seconds = min(max(seconds, expected / SURPRISE), expected * SURPRISE)
        self.seen += 1
        spread = [_dot(row, x) for row in self._doubts]
        gain = [part / (FADE + _dot(spread, x)) for part in spread]
        self._weights = [w + g * (seconds - expected) for w, g in zip(self._weights, gain, strict=True)]
        self._doubts = [[(doubt - g * s) / FADE for doubt, s in zip(row, spread, strict=True)]
                        for row, g in zip(self._doubts, gain, strict=True)]  # fmt: skip
        total = sum(self._doubts[i][i] for i in range(4))
        if total > MOST_DOUBT:
            self._doubts = [[doubt * MOST_DOUBT / total for doubt in row] for row in self._doubts]

    def _costs(self) -> list[float]:
        """Seconds: fixed, a token, a cached token, a pair. None is below 0, whatever noise says."""
        return [max(0.0, weight * scale) for weight, scale in zip(self._weights, SCALES, strict=True)]

    def predict(self, load: Load) -> float:
        """Seconds of a step; 0 before any was seen."""
        return _dot(self._costs(), (1, *load))

    @property
    def token_s(self) -> float:
        """Seconds that a token more takes, attention left out; 0 where nothing is known."""
        return self._costs()[1]

    def tokens_within(self, limit_s: float, decodes: Load, context: int) -> float:
        """Prompt tokens that fit into limit_s beside the decodes, `context` cached tokens before the first of them;
        negative where the decodes alone take longer, infinite where nothing is known that would limit them."""
        _, token_s, _, pair_s = self._costs()
        left_s, each_s = limit_s - self.predict(decodes), token_s + pair_s * context
        if each_s == 0 and pair_s == 0:
            return math.inf
        if left_s <= 0:
            return left_s / each_s if each_s else -1.0
        return 2 * left_s / (each_s + math.sqrt(each_s * each_s + 2 * pair_s * left_s))
