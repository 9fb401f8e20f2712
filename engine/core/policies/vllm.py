"""Prompts first: as soon as a waiting prompt fits, a step runs whole prompts only, and decodes wait for it.

Source: the scheduling of vLLM before chunked prefill, as Sarathi-Serve (OSDI 2024) compares with it.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.policies import PolicyOptions, policies
from engine.core.sequence import Sequence


@policies.register("vllm")
class Vllm:
    """chunk_tokens: prompt tokens of one step (default and maximum: max_model_len)."""

    reserves_context = False

    def __init__(self, options: PolicyOptions) -> None:
        options.refuse("vllm")
        self.batch_tokens = min(options.chunk_tokens or options.max_model_len, options.max_model_len)
        self.prompt_limit = self.batch_tokens

    def fill(self, draft: StepDraft) -> None:
        """New prompts if any fits, else a token for each decode."""
        while (waiting := draft.next_waiting()) is not None:
            if not self._fits(draft, waiting) or not draft.admit(waiting, waiting.left):
                break
        if draft.num_chunks or draft.ignored:
            return
        draft.sort_running()
        draft.decode()

    def _fits(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Whether a prompt fits the step. One that a restart made longer than a batch runs alone."""
        if draft.num_tokens + sequence.left <= self.batch_tokens:
            return True
        return sequence.epoch > 0 and draft.num_tokens == 0
