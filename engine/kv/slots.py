"""The vAttention store: each sequence's cache is one slot of virtual memory, pages under it only where tokens are.

It turns a plan's sequences into slots and lengths for the allocator. It does not know policies, budgets or models.
"""

from __future__ import annotations

import torch

from engine.core.errors import ConfigError, InvariantError
from engine.core.plan import Chunk, StepPlan
from engine.runner.batch import Batch
from vattention_ext import KvAllocator, KvGeometry

AHEAD_TOKENS = 8  # steps that the mapper has for a decode's next page: many sequences may cross into one together


class SlotStore:
    """KvStore over vattention_ext. geometry: the slabs; dtype must have geometry.element_bytes.

    clear: a released slot's pages go back to the system at once instead of being kept, so that the next owner of
    that memory reads zeros (the system clears what it hands out). anchor: slot 0 keeps its first pages and is never
    given out, so that the slabs' base addresses are always mapped: Triton asks the driver about every base address that
    it is given. The geometry has one slot and the allocator one group more for it.
    """

    def __init__(
        self, geometry: KvGeometry, allocator: KvAllocator, dtype: torch.dtype, *, clear: bool = False,
        anchor: bool = False,
    ) -> None:  # fmt: skip
        if dtype.itemsize != geometry.element_bytes:
            raise InvariantError(f"dtype {dtype} is not {geometry.element_bytes} bytes wide")
        self.geometry, self.allocator, self._dtype, self._clear = geometry, allocator, dtype, clear
        self._slot: dict[int, int] = {}
        self._anchors = int(anchor)
        if anchor and (allocator.acquire(1) != 0 or allocator.ensure(0, 1) is not None):
            raise InvariantError("a fresh allocator did not give slot 0 and its first pages")
        self._known: dict[int, int] = {}  # tokens that came with the admission: as far as prompts will run
        self._flat = [torch.from_dlpack(region).view(dtype) for region in allocator.regions]

    @property
    def addressable_groups(self) -> int:
        """Groups that can be mapped whatever their order: each page may cost the process one kernel mapping, and
        each slot one more a plane for its unmapped rest. Unbounded (a very large number) where a driver has no limit.
        """
        stats, g = self.allocator.stats(), self.geometry
        if stats.mapping_budget < 0:
            return 1 << 62
        return max(0, (stats.mapping_budget - stats.mappings) // g.planes - g.slots)

    def apply(self, plan: StepPlan) -> frozenset[int]:
        """See KvStore. A refused sequence gives its slot back here; the scheduler preempts it."""
        for seq_id in plan.releases:
            self._release(seq_id)
        refused: set[int] = set()
        for admission in plan.admissions:
            slot = self.allocator.acquire(len(admission.tokens))
            if isinstance(slot, int):
                self._slot[admission.seq_id] = slot
                self._known[admission.seq_id] = len(admission.tokens)
            else:
                refused.add(admission.seq_id)
        chunks = [chunk for chunk in plan.chunks if chunk.seq_id not in refused]
        wanted = [(self._slot[chunk.seq_id], chunk.end) for chunk in chunks]
        for index in self.allocator.ensure_many(wanted):
            refused.add(chunks[index].seq_id)
            self._release(chunks[index].seq_id)
        return frozenset(refused)

    def look_ahead(self, plan: StepPlan) -> None:
        """A prompt's next chunk, taken to be as long as this whole step (it may have begun in what another left of it),
        and some tokens of decoding."""
        tokens = sum(chunk.length for chunk in plan.chunks)
        alive = [chunk for chunk in plan.chunks if chunk.seq_id in self._slot]
        self.allocator.look_ahead([(self._slot[chunk.seq_id], self._soon(chunk, tokens)) for chunk in alive])

    def _soon(self, chunk: Chunk, next_tokens: int) -> int:
        """Tokens that the chunk's sequence may have a few steps later."""
        end = max(chunk.end, min(self._known[chunk.seq_id], chunk.end + next_tokens))
        return min(end + AHEAD_TOKENS, self.geometry.max_tokens)

    def fence(self) -> None:
        """See KvStore; on the current stream."""
        self.allocator.fence(torch.cuda.current_stream().cuda_stream)

    def place(self, batch: Batch) -> Batch:
        """See KvStore: a slot's tokens stand at their positions."""
        return batch

    def borrow(self, tokens: int) -> int:
        """See KvStore."""
        slot = self.allocator.acquire(tokens)
        if not isinstance(slot, int) or self.allocator.ensure(slot, tokens) is not None:
            if isinstance(slot, int):
                self.allocator.release(slot)
            raise ConfigError(f"the KV pool cannot hold one step of {tokens} tokens; raise --gpu-memory-utilization")
        return slot

    def give_back(self, slot: int) -> None:
        """See KvStore; its pages go back to the system."""
        self.allocator.trim(slot, 0)
        self.allocator.release(slot)
        self.allocator.reclaim(0)

    def slot_of(self, seq_id: int) -> int:
        """See KvStore."""
        return self._slot[seq_id]

    def layer_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See KvStore. mega: token stride L*G*D; per_layer: G*D."""
        g = self.geometry
        row = g.kv_heads * g.head_dim
        slot_stride = g.slot_bytes // g.element_bytes
        shape = (g.slots, g.max_tokens, g.kv_heads, g.head_dim)
        if g.layout == "mega":
            strides = (slot_stride, g.layers * row, g.head_dim, 1)
            k, v = (flat.as_strided(shape, strides, layer * row) for flat in self._flat)
        else:
            strides = (slot_stride, row, g.head_dim, 1)
            k, v = (self._flat[side * g.layers + layer].as_strided(shape, strides) for side in (0, 1))
        return k, v

    def set_limit(self, groups: int) -> None:
        """See KvStore."""
        self.allocator.set_limit(groups + self._anchors)

    def stats(self) -> dict[str, int]:
        """See KvStore."""
        stats = self.allocator.stats()
        return {
            "kv_slots_active": stats.active_slots - self._anchors,
            "kv_groups_total": stats.total_groups - self._anchors,
            "kv_groups_in_use": stats.in_use_groups - self._anchors,
            "kv_groups_kept": stats.kept_groups,
            "kv_groups_look_ahead": stats.look_ahead_groups,
            "kv_mapped_bytes": stats.mapped_bytes,
            "kv_stall_us_total": round(stats.map_wait_us + stats.grow_us + stats.fence_wait_us),
        }

    def close(self) -> None:
        """See KvStore."""
        self._flat.clear()
        self.allocator.close()

    def _release(self, seq_id: int) -> None:
        slot = self._slot.pop(seq_id, None)
        if slot is None:
            return
        del self._known[seq_id]
        if self._clear:
            self.allocator.trim(slot, 0)
        self.allocator.release(slot)
