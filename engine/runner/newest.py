"""The newest token of every slot, kept on the device, so that a step can follow one whose tokens nobody read yet."""

from __future__ import annotations

import torch

from engine.runner.batch import Batch


class NewestTokens:
    """(S + 1,) ids on the device; the last place takes what belongs to no slot (padding has slot -1)."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots = slots
        self._ids = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def resolve(self, batch: Batch) -> torch.Tensor:
        """The batch's tokens (N,) int64 with each -1 replaced by the newest token of its slot."""
        if batch.tokens.device.type == "cpu":
            return batch.tokens  # every token is known: a step starts when the one before has ended
        newest = self._ids.index_select(0, self._places(batch.token_slots))
        return torch.where(batch.tokens < 0, newest, batch.tokens)

    def note(self, batch: Batch, picked: torch.Tensor) -> None:
        """picked: (R,) ids of the first R of batch.sample_rows. -1 (not finite) is noted as 0: its sequence ends."""
        if picked.device.type == "cpu":
            return
        rows = batch.sample_rows[: picked.shape[0]]
        places = self._places(batch.token_slots.index_select(0, rows))
        self._ids.index_copy_(0, places, picked.clamp(min=0))

    def _places(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots < 0, self._slots, slots).long()
