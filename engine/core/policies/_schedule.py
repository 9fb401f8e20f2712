"""Dynamic chunking: chunk sizes that shrink as a prompt's computed part grows, so that a step takes about as long.

It knows one prompt's progress, nothing of batches. Source: Sarathi-Serve, dynamic chunking schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.errors import ConfigError

STEP_TOKENS = 32  # both ends are multiples of this, and sizes are rounded to it
BUDGETS = ("request", "step")


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Sizes from high to low over `stages` equal stages of `max_tokens` prompt tokens.

    budget: "request" = each prompt may fill the step up to its own size (as published: under load a step stays at
    `high_tokens`); "step" = the smallest size among a step's prompts bounds the step.
    Raises ConfigError naming field, value and range.
    """

    low_tokens: int
    high_tokens: int
    max_tokens: int
    stages: int
    budget: str = "request"
    sizes: tuple[int, ...] = field(init=False)  # tokens by stage, largest first
    stage_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("low_tokens", "high_tokens"):
            value = getattr(self, name)
            if value < STEP_TOKENS or value % STEP_TOKENS:
                raise ConfigError(f"{name}={value} is not a multiple of {STEP_TOKENS} of at least {STEP_TOKENS}")
        if self.low_tokens > self.high_tokens:
            raise ConfigError(f"low_tokens={self.low_tokens} is above high_tokens={self.high_tokens}")
        if self.max_tokens < 1 or self.stages < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} and stages={self.stages} must be at least 1")
        if self.budget not in BUDGETS:
            raise ConfigError(f"budget={self.budget!r} is not one of {', '.join(BUDGETS)}")
        object.__setattr__(self, "sizes", _sizes(self.low_tokens, self.high_tokens, self.stages))
        object.__setattr__(self, "stage_tokens", -(-self.max_tokens // self.stages))

    def chunk_tokens(self, computed_tokens: int) -> int:
        """The size for a prompt of which so much is computed. Beyond max_tokens the last stage goes on."""
        return self.sizes[min(computed_tokens // self.stage_tokens, self.stages - 1)]


def _sizes(low: int, high: int, stages: int) -> tuple[int, ...]:
    """`stages` sizes evenly from high to low, cut to integers, then rounded to 32 (ties to even)."""
    step = (high - low) / (stages - 1) if stages > 1 else 0.0
    rising = [int(index * step + low) for index in range(stages)]
    if stages > 1:
        rising[-1] = high
    return tuple(round(size / STEP_TOKENS) * STEP_TOKENS for size in reversed(rising))
