"""Stall-free batching: every decode runs, prompts fill what is left of the step's token budget in chunks.

Source: Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (OSDI 2024), section 4.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.policies import DEFAULT_CHUNK_TOKENS, PolicyOptions, policies
from engine.core.sequence import Sequence


@policies.register("sarathi")
class Sarathi:
    """The default. See the module; `schedule` replaces the fixed chunk by one that shrinks with progress."""

    reserves_context = False

    def __init__(self, options: PolicyOptions) -> None:
        self.prompt_limit = options.max_model_len
        self.schedule = options.schedule
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
        for sequence in draft.decode():
            size = self._size(sequence)
            bound = min(bound, size) if self._per_step else size
            starved = starved or bound < draft.num_tokens
            draft.prefill(sequence, min(sequence.left, bound - draft.num_tokens))
        if starved:  # decodes alone are beyond a late prompt's size: let them drain before they become more
            return
        while (waiting := draft.next_waiting()) is not None:
            size = self._size(waiting)
            bound = min(bound, size) if self._per_step else size
            if not draft.admit(waiting, min(waiting.left, bound - draft.num_tokens)):
                return

    def _size(self, sequence: Sequence) -> int:
        """Tokens that a step may reach while it runs this prompt."""
        return self.chunk_tokens if self.schedule is None else self.schedule.chunk_tokens(sequence.computed)
