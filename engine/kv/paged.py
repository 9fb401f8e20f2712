"""The paged twin of the slot store, for research: block tables over one pool, the layout that vAttention does without.

A block is a page group, so the ledger counts the same either way; but a block holds whole tokens, so a page must. All
of the pool is allocated at once. It follows plans like SlotStore; it does not know policies, budgets or models.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from engine.core.errors import ConfigError, InvariantError
from engine.core.plan import StepPlan
from engine.runner.batch import Batch, Paged
from vattention_ext import KvGeometry

_LINUX_PAGE_BYTES = 4096  # page_bytes is a multiple of it


class PagedStore:
    """KvStore over block tables. geometry: its page_bytes must be a multiple of token_bytes; its layout is the pool's:
    mega (blocks, T, L, G, D), per_layer (L, blocks, T, G, D), K and V each.

    clear: a block is zeroed as its sequence ends. Raises ConfigError for a page that holds no whole tokens.
    """

    def __init__(
        self, geometry: KvGeometry, pool_groups: int, dtype: torch.dtype, device: torch.device, *, clear: bool = False
    ) -> None:
        if dtype.itemsize != geometry.element_bytes:
            raise InvariantError(f"dtype {dtype} is not {geometry.element_bytes} bytes wide")
        page_bytes, token_bytes = geometry.page_bytes, geometry.token_bytes
        if page_bytes % token_bytes:
            step = math.lcm(token_bytes, _LINUX_PAGE_BYTES)
            raise ConfigError(
                f"--kv-page-bytes {page_bytes} is not a multiple of a token's {token_bytes} bytes, and a block of a "
                f"paged backend holds whole tokens; use {max(1, page_bytes // step) * step} or a slab backend"
            )
        self.geometry, self.block_tokens, self._clear = geometry, page_bytes // token_bytes, clear
        g = geometry
        shape: tuple[int, ...] = (2, pool_groups, self.block_tokens, g.layers, g.kv_heads, g.head_dim)
        if g.layout == "per_layer":
            shape = (2, g.layers, pool_groups, self.block_tokens, g.kv_heads, g.head_dim)
        self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(pool_groups - 1, -1, -1))
        self._free_slots = list(range(g.slots - 1, -1, -1))
        self._slot: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  # slot -> its blocks, in order
        self.host_table: np.ndarray = np.zeros((g.slots, g.groups_per_slot), dtype=np.int32)
        self.table = torch.from_numpy(self.host_table.copy()).to(device)

    @property
    def addressable_groups(self) -> int:
        """See KvStore: nothing is mapped."""
        return 1 << 62

    def apply(self, plan: StepPlan) -> frozenset[int]:
        """See KvStore."""
        for seq_id in plan.releases:
            self._release(seq_id)
        refused: set[int] = set()
        for admission in plan.admissions:
            if not self._free_slots:
                refused.add(admission.seq_id)
                continue
            slot = self._free_slots.pop()
            self._slot[admission.seq_id], self._held[slot] = slot, []
        changed = set()
        for chunk in plan.chunks:
            if chunk.seq_id in refused:
                continue
            slot = self._slot[chunk.seq_id]
            before = len(self._held[slot])
            if not self._grow(slot, chunk.end):
                refused.add(chunk.seq_id)
                self._release(chunk.seq_id)
            elif len(self._held[slot]) > before:
                changed.add(slot)
        self._upload(sorted(changed))
        return frozenset(refused)

    def look_ahead(self, plan: StepPlan) -> None:
        """See KvStore: a block costs nothing to take."""

    def fence(self) -> None:
        """See KvStore: kernels of one stream run in order, so a block's next owner writes after its last reader."""

    def place(self, batch: Batch) -> Batch:
        """See KvStore: the block and row of every token of the batch; a token of no slot (-1) gets block -1."""
        known = batch.token_slots >= 0
        slots = batch.token_slots.clamp(min=0).long()
        blocks = self.table[slots, (batch.positions // self.block_tokens).long()]
        rows = (batch.positions % self.block_tokens).to(torch.int32)
        blocks = torch.where(known, blocks, -1).to(torch.int32)
        return dataclasses.replace(batch, paged=Paged(self.table, self.host_table, self.block_tokens, blocks, rows))

    def borrow(self, tokens: int) -> int:
        """See KvStore."""
        slot = self._free_slots.pop()
        self._held[slot] = []
        if not self._grow(slot, tokens):
            self.give_back(slot)
            raise ConfigError(f"the KV pool cannot hold one step of {tokens} tokens; raise --kv-pool-bytes")
        self._upload([slot])
        return slot

    def give_back(self, slot: int) -> None:
        """See KvStore."""
        blocks = self._held.pop(slot)
        if self._clear and blocks:
            axis = 2 if self.geometry.layout == "per_layer" else 1
            self._pool.index_fill_(axis, torch.tensor(blocks, device=self._pool.device), 0.0)
        self._free.extend(reversed(blocks))
        self._free_slots.append(slot)

    def slot_of(self, seq_id: int) -> int:
        """See KvStore."""
        return self._slot[seq_id]

    def layer_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each (blocks, block_tokens, G, D), strided."""
        if self.geometry.layout == "per_layer":
            return self._pool[0, layer], self._pool[1, layer]
        return self._pool[0, :, :, layer], self._pool[1, :, :, layer]

    def set_limit(self, groups: int) -> None:
        """See KvStore: the pool is allocated whole, so the ledger's limit is the only one."""

    def stats(self) -> dict[str, int]:
        """See KvStore."""
        total, group_bytes = self._total, self.geometry.group_bytes
        return {
            "kv_slots_active": len(self._held),
            "kv_groups_total": total,
            "kv_groups_in_use": total - len(self._free),
            "kv_groups_kept": 0,
            "kv_groups_look_ahead": 0,
            "kv_mapped_bytes": total * group_bytes,
        }

    def close(self) -> None:
        """See KvStore."""
        self._pool = self._pool.new_empty(0)

    @property
    def _total(self) -> int:
        return len(self._free) + sum(map(len, self._held.values()))

    def _grow(self, slot: int, tokens: int) -> bool:
        """Blocks of a slot for `tokens` tokens; False, and nothing taken, when too few are free."""
        held = self._held[slot]
        need = self.geometry.groups_for(tokens) - len(held)
        if need > len(self._free):
            return False
        for _ in range(need):
            block = self._free.pop()
            self.host_table[slot, len(held)] = block
            held.append(block)
        return True

    def _release(self, seq_id: int) -> None:
        slot = self._slot.pop(seq_id, None)
        if slot is not None:
            self.give_back(slot)

    def _upload(self, slots: list[int]) -> None:
        """The rows of these slots, to the device."""
        if not slots:
            return
        rows, where = torch.from_numpy(self.host_table[slots]), torch.tensor(slots)
        if self.table.device.type != "cpu":  # from pinned memory, so that nothing waits for the copies
            rows, where = rows.pin_memory(), where.pin_memory()
        device = self.table.device
        self.table.index_copy_(0, where.to(device, non_blocking=True), rows.to(device, non_blocking=True))
