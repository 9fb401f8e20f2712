"""Stall-free batching: every decode runs, prompts fill what is left of the step's token budget in chunks.

Source: Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (OSDI 2024), section 4.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.errors import ConfigError
from engine.core.policies import DEFAULT_CHUNK_TOKENS, PolicyOptions, policies
from engine.core.sequence import Sequence


@policies.register("sarathi")
class Sarathi:
    """The default. See the module; `schedule` replaces the fixed chunk by one that shrinks with progress, `pace` by one
    that keeps steps with decodes as short as asked."""

    reserves_context = False

    def __init__(self, options: PolicyOptions) -> None:
        self.prompt_limit = options.max_model_len
        self.schedule, self.pace = options.schedule, options.pace
        if self.pace is not None and self.schedule is not None:
            raise ConfigError("a chunk schedule and a pace contradict each other; give one")
        self.chunk_tokens = options.chunk_tokens or DEFAULT_CHUNK_TOKENS
        if self.schedule is not None:
            self.chunk_tokens = self.schedule.high_tokens
        self._per_step = self.schedule is not None and self.schedule.budget == "step"

    def fill(self, draft: StepDraft) -> None:
        """Decodes, then prompts in progress, then as many new prompts as budget, slots and memory take."""
        draft.budget_tokens = self.chunk_tokens
        draft.sort_running()
        starved = False
        bound = self.chunk_tokens
        partial = draft.decode()
        reach = self._reach(draft)
        for sequence in partial:
            size = self._size(sequence, reach)
            bound = min(bound, size) if self._per_step else size
            starved = starved or bound < draft.num_tokens
            draft.prefill(sequence, min(sequence.left, bound - draft.num_tokens))
        if starved:  # decodes alone are beyond a late prompt's size: let them drain before they become more
            return
        while (waiting := draft.next_waiting()) is not None:
            size = self._size(waiting, reach)
            bound = min(bound, size) if self._per_step else size
            if not draft.admit(waiting, min(waiting.left, bound - draft.num_tokens)):
                return

    def _reach(self, draft: StepDraft) -> int:
        """Tokens of this step at most, its decodes being in. Without decodes nobody waits for it to be short."""
        if self.pace is None or not draft.num_tokens:
            return self.chunk_tokens
        chunk = self.pace.chunk_tokens(len(draft.queues.waiting))
        return self.chunk_tokens if chunk is None else min(self.chunk_tokens, draft.num_tokens + chunk)

    def _size(self, sequence: Sequence, reach: int) -> int:
        """Tokens that a step may reach while it runs this prompt."""
        return reach if self.schedule is None else self.schedule.chunk_tokens(sequence.computed)
