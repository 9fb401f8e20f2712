"""Request-level batching: a batch of requests runs until all of them have ended, then the next batch starts.

Source: FasterTransformer's serving, as Orca (OSDI 2022) and Sarathi-Serve (OSDI 2024) describe it.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.policies import PolicyOptions, policies


@policies.register("faster_transformer")
class FasterTransformer:
    """No token budget and no preemption: each sequence reserves max_model_len tokens."""

    reserves_context = True

    def __init__(self, options: PolicyOptions) -> None:
        options.refuse("faster_transformer", chunk_tokens=True)
        self.prompt_limit = options.max_model_len

    def fill(self, draft: StepDraft) -> None:
        """Decodes if there are any, else whole prompts."""
        for sequence in draft.decode(grows=False):
            draft.prefill(sequence, sequence.left)
        if draft.num_chunks:
            return
        while (waiting := draft.next_waiting()) is not None:
            if not draft.admit(waiting, waiting.left):
                return
