"""Chunked prefill without mixing: steps of prompt chunks and steps of decodes take turns.

Source: the ablation of Sarathi-Serve (OSDI 2024) that has chunks but no mixed batches.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.policies import DEFAULT_CHUNK_TOKENS, PolicyOptions, policies
from engine.core.sequence import Status


@policies.register("simple_chunking")
class SimpleChunking:
    """chunk_tokens: prompt tokens of one step. A turn of prompts without any becomes a turn of decodes."""

    reserves_context = False

    def __init__(self, options: PolicyOptions) -> None:
        options.refuse("simple_chunking")
        self.prompt_limit = options.max_model_len
        self.chunk_tokens = options.chunk_tokens or DEFAULT_CHUNK_TOKENS
        self._prefill_turn = True

    def fill(self, draft: StepDraft) -> None:
        """Prompts in progress, else new prompts; in the other turn, decodes."""
        draft.sort_running()
        if self._prefill_turn:
            draft.budget_tokens = self.chunk_tokens
            self._prefill(draft)
            if draft.num_chunks or draft.ignored:
                self._prefill_turn = False
                return
        draft.budget_tokens = None
        draft.decode(keep_prefilling=True)
        self._prefill_turn = True

    def _prefill(self, draft: StepDraft) -> None:
        if any(sequence.status is Status.PREFILLING for sequence in draft.running):
            for sequence in draft.visit():
                if sequence.status is Status.PREFILLING:
                    draft.prefill(sequence, min(sequence.left, self.chunk_tokens - draft.num_tokens))
                else:
                    draft.keep(sequence)
            return
        while (waiting := draft.next_waiting()) is not None:
            if not draft.admit(waiting, min(waiting.left, self.chunk_tokens - draft.num_tokens)):
                return
