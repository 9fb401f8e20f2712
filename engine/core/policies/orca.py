"""Iteration-level batching: every decode and every waiting prompt, whole, in one step; memory for the worst case.

Source: Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models (OSDI 2022).
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.policies import PolicyOptions, policies


@policies.register("orca")
class Orca:
    """No token budget and no preemption: each sequence reserves max_model_len tokens."""

    reserves_context = True

    def __init__(self, options: PolicyOptions) -> None:
        options.refuse("orca", chunk_tokens=True)
        self.prompt_limit = options.max_model_len

    def fill(self, draft: StepDraft) -> None:
        """Decodes, then whole prompts."""
        draft.sort_running()
        for sequence in draft.decode(grows=False):
            draft.prefill(sequence, sequence.left)
        while (waiting := draft.next_waiting()) is not None:
            if not draft.admit(waiting, waiting.left):
                return
