"""Sessions follow step plans: one is opened when a sequence gets its slot and closed when it gives it back.

Every epoch of a sequence is a session of its own, with a nonce of its own. It knows ids and slots, no keys or tensors.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from engine.core.plan import StepPlan
from engine.runner.batch import Batch
from engine.scx.attention import Scx
from engine.scx.errors import WorkerLost

NONCE_BYTES = 16


class Sessions:
    """The runner's hand on the secure side. namespaces: sequence -> its key namespace, for whoever shares tokens."""

    def __init__(self, scx: Scx) -> None:
        self.scx = scx
        self.namespaces: dict[int, str] = {}
        self._slots: dict[int, int] = {}

    def follow(self, plan: StepPlan, refused: Collection[int], slot_of: Callable[[int], int]) -> None:
        """After the plan's memory was applied. refused: sequences that hold no slot now. Raises ScxError; where the
        secure side is lost, sequences get no session instead (lost())."""
        for seq_id in plan.releases:
            self._close(seq_id)
        for seq_id in refused:
            self._close(seq_id)
        for admission in plan.admissions:
            if admission.seq_id not in refused:
                slot = slot_of(admission.seq_id)
                nonce = secrets.token_bytes(NONCE_BYTES)
                try:
                    self.namespaces[admission.seq_id] = self.scx.secure.open(
                        slot, nonce, tenant=admission.tenant, epoch=admission.epoch
                    )
                except WorkerLost:
                    continue
                self._slots[admission.seq_id] = slot

    def lost(self, seq_id: int) -> bool:
        """Whether a sequence's session is gone, so that none of its rows can be encoded any more."""
        slot = self._slots.get(seq_id)
        return slot is None or not self.scx.secure.holds(slot)

    def claim(self, batch: Batch) -> None:
        """Before a step that is replayed from graphs; a secure side that is not in them counts rows when it is asked.
        Raises an ScxError."""
        if self.scx.secure.in_stream:
            self.scx.secure.claim(batch)

    def seal(self, batch: Batch) -> None:
        """Behind a step that was replayed as a whole, attention too."""
        self.scx.seal_all(batch)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What runs inside is recorded and belongs to no step."""
        self.scx.secure.recording = True
        try:
            yield
        finally:
            self.scx.secure.recording = False

    def _close(self, seq_id: int) -> None:
        self.namespaces.pop(seq_id, None)
        slot = self._slots.pop(seq_id, None)
        if slot is not None:
            self.scx.secure.close(slot)

    def shut(self) -> None:
        """End every session and forget the root."""
        self._slots.clear()
        self.namespaces.clear()
        self.scx.secure.shut()
