"""The seam between a step plan and memory: a store follows plans and may refuse; it never decides who gets memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.core.plan import StepPlan

if TYPE_CHECKING:
    import torch

    from engine.runner.batch import Batch
    from vattention_ext import KvGeometry


class KvStore(Protocol):
    """Slots of a sequence's keys and values."""

    geometry: KvGeometry

    @property
    def addressable_groups(self) -> int:
        """Groups that the system can map, whatever their order."""

    def apply(self, plan: StepPlan) -> frozenset[int]:
        """Release, admit and map for one step. Returns the sequences whose memory was refused; they hold no slot."""

    def look_ahead(self, plan: StepPlan) -> None:
        """While `plan` runs, start mapping what the steps after it will need. Best effort, returns at once."""

    def fence(self) -> None:
        """The step's kernels are launched: what they may read stays mapped until they are done."""

    def place(self, batch: Batch) -> Batch:
        """The batch with whatever this store's kernels need beside slots and lengths. Fixed launches, no waiting."""

    def borrow(self, tokens: int) -> int:
        """A slot with memory for `tokens` tokens, outside of any plan. Raises ConfigError when the pool is smaller."""

    def give_back(self, slot: int) -> None:
        """Ends a borrow(); its memory goes back to the pool."""

    def slot_of(self, seq_id: int) -> int:
        """The slot of an admitted sequence."""

    def layer_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each (S, C, G, D), strided; only what is mapped may be touched."""

    def set_limit(self, groups: int) -> None:
        """Most page groups that may exist from now on; takes nothing that is in use."""

    def stats(self) -> dict[str, int]:
        """Counts for /metrics: groups and bytes."""

    def close(self) -> None:
        """Unmap and release everything. Idempotent."""
