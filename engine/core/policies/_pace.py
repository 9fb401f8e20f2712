"""How many tokens a step may run so that those who decode wait no longer than asked, by what steps are known to last.

It knows neither clocks nor sequences: whoever drives it says how long a step took, so the same times give the same
chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.core.errors import ConfigError
from engine.core.load import Load
from engine.core.policies._order import PromptCost
from engine.core.policies._step_time import StepTime

STEP_TOKENS = 32  # of prompts, never less: a prompt always gets on
GRAIN_TOKENS = 128  # what a GPU's products round a long step up to; a shorter step has finer grains
CALM_S, CROWDED_S = 0.17, 0.40  # of backlog_s: the target holds up to the one, the bound from the other
MOST_WAITING_S = 2 * CROWDED_S  # counted in one step: where decodes leave hardly any room, a token takes for ever
BACKLOG_FADE = 0.98  # weight, for each newer step, of what waited: a burst shall not make steps long, a crowd shall


@dataclass(slots=True)
class Pace:
    """target_s: what a step with decodes shall last while few prompts wait; bound_s: what it may last when many do.

    Raises ConfigError naming value and range.
    """

    target_s: float
    bound_s: float
    backlog_s: float = 0.0  # seconds that what waits takes in steps as long as they are now, averaged over steps
    times: StepTime = field(default_factory=StepTime)
    _granted: int = 0  # tokens that a step might run when last asked

    def __post_init__(self) -> None:
        if not 0 < self.target_s <= self.bound_s:
            raise ConfigError(f"target_s={self.target_s} is not above 0 and at most bound_s={self.bound_s}")

    def observe(self, load: Load, seconds: float) -> None:
        """A step of this load took so long. One much smaller than those to be sized tells nothing of them: weights are
        read once, however few tokens there are."""
        if 2 * load.tokens >= self._granted:
            self.times.observe(load, seconds)

    @property
    def limit_s(self) -> float:
        """What a step with decodes shall last now."""
        crowd = min(1.0, max(0.0, (self.backlog_s - CALM_S) / (CROWDED_S - CALM_S)))
        return self.target_s + (self.bound_s - self.target_s) * crowd

    def reach(self, decodes: Load, context: int, backlog_tokens: int, most: int) -> int:
        """Tokens of a step that has these decodes, `most` at most, while so many prompt tokens are still to run, the
        first of them behind `context` cached ones; asked once a step."""
        # by whole steps, whose times are known; where all are of two or three sizes, what a token more takes is not
        cost = self.prompt_cost(decodes, most)
        waiting_s = 0.0 if cost is None else min(MOST_WAITING_S, backlog_tokens * cost.token_s)
        self.backlog_s += (1 - BACKLOG_FADE) * (waiting_s - self.backlog_s)
        prompts = self.times.tokens_within(self.limit_s, decodes, context)
        if prompts == math.inf:  # nothing is known that would limit them
            return most
        total = decodes.tokens + int(prompts)
        grain = min(GRAIN_TOKENS, max(STEP_TOKENS, 1 << (total // 8).bit_length()))
        self._granted = min(most, max(decodes.tokens + STEP_TOKENS, total // grain * grain))
        return self._granted

    def prompt_cost(self, decodes: Load, most: int) -> PromptCost | None:
        """What prompts take in steps as long as they are now, of at most `most` tokens and with these decodes; None
        where nothing is known."""
        prompts = min(self.times.tokens_within(self.limit_s, decodes, 0), most - decodes.tokens)
        prompts = max(STEP_TOKENS, prompts)
        seconds = self.times.predict(Load(decodes.tokens + int(prompts), decodes.cached, decodes.pairs))
        return PromptCost(seconds / prompts, self.times.pair_s) if seconds > 0 else None
