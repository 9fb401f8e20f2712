"""Two backends as one: prompts go to the one measured faster for them, decodes to the other.

It knows neither; a hybrid batch is split where its prompts end.
"""

from __future__ import annotations

import dataclasses

import torch

from engine.attention.base import AttentionBackend
from engine.runner.batch import Batch


class ByPhase:
    """AttentionBackend over two; a decode graph replays what the decoding one launches."""

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        self._prefill, self._decode = prefill, decode
        self.caps = dataclasses.replace(decode.caps, batch_invariant=False)
        self._whole: Batch | None = None  # the batch that _halves are of
        self._halves: tuple[Batch, Batch] | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Nothing of its own."""
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        tokens = batch.num_prefill_tokens
        if tokens == 0:
            return self._decode.attend(q, k, v, batch, window, out)
        if tokens == q.shape[0]:
            return self._prefill.attend(q, k, v, batch, window, out)
        if self._whole is not batch or self._halves is None:  # once a step, not once a layer
            self._whole, self._halves = batch, batch.split()
        prompts, decodes = self._halves
        if out is None:
            out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        self._prefill.attend(q[:tokens], k, v, prompts, window, out[:tokens])
        self._decode.attend(q[tokens:], k, v, decodes, window, out[tokens:])
        return out
