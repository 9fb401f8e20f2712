"""How many prompt tokens a step may take so that those who decode wait no longer than asked: learnt from step times.

A step is taken to last base + slope * prompt tokens, fitted to the steps that were, newer ones counting more. It knows
neither clocks nor sequences: whoever drives it says how long a step took, so the same times give the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.errors import ConfigError

STEP_TOKENS = 32  # chunks are multiples of this, and never less: a prompt always gets on
CALM_S, CROWDED_S = 0.10, 0.24  # seconds of prefill that wait: the target holds up to the one, the bound from the other
FADE = 0.97  # weight of a step for each newer one
BACKLOG_FADE = 0.98  # likewise, of what waited: a burst shall not make steps long, a crowd that stays shall


@dataclass(slots=True)
class Pace:
    """target_s: what a step with decodes shall last while few prompts wait; bound_s: what it may last when many do.

    Raises ConfigError naming value and range.
    """

    target_s: float
    bound_s: float
    backlog_s: float = 0.0  # seconds of prefill that wait, averaged over steps
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, x, x * x, y, x * y; x tokens, y seconds

    def __post_init__(self) -> None:
        if not 0 < self.target_s <= self.bound_s:
            raise ConfigError(f"target_s={self.target_s} is not above 0 and at most bound_s={self.bound_s}")

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step of so many prompt tokens took so long."""
        x, y = float(prompt_tokens), seconds
        self._sums = [FADE * old + new for old, new in zip(self._sums, (1.0, x, x * x, y, x * y), strict=True)]

    def predict(self) -> tuple[float, float]:
        """(base, slope) in seconds and seconds a token; (0, 0) before anything was seen. A slope that the steps seen
        do not tell (all had as many prompt tokens) is what all of their time would make of it."""
        count, x, xx, y, xy = self._sums
        if not count:
            return 0.0, 0.0
        spread = count * xx - x * x
        if spread > 1e-6 * max(1.0, xx * count):
            slope = max(0.0, (count * xy - x * y) / spread)
            return max(0.0, (y - slope * x) / count), slope
        return (y / count, 0.0) if x == 0 else (0.0, y / x)

    def chunk_tokens(self, backlog_tokens: int) -> int | None:
        """Prompt tokens of a step that has decodes, while so many are still to run; asked once a step. None: nothing is
        known that would limit them."""
        base, slope = self.predict()
        if slope == 0.0:
            return None
        self.backlog_s += (1 - BACKLOG_FADE) * (backlog_tokens * slope - self.backlog_s)
        crowd = min(1.0, max(0.0, (self.backlog_s - CALM_S) / (CROWDED_S - CALM_S)))
        limit_s = self.target_s + (self.bound_s - self.target_s) * crowd
        tokens = int((limit_s - base) / slope) // STEP_TOKENS * STEP_TOKENS
        return max(STEP_TOKENS, tokens)
