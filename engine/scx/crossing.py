"""Secure sides that rows of a GPU cross to and come back from in its stream; where they cross to is a subclass's.

An encode is three launches: all rows' projections into memory that both sides reach, what maps them there, and the
store into the slabs, which reads q, k and v where they were left; a decode is the same with a copy in place of the
store. All of it may stand in a CUDA graph, and the thread that launches steps is never held up.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch

from engine.runner.batch import Batch
from engine.scx.on_device import InStreamSide, one_each
from engine.scx.schemes import Maps
from tessera_kernels.host_jobs import Crossing


class Room(NamedTuple):
    """Memory for N rows that both sides reach. came, goes: bytes; positions, slots: (N,) int32 of the step that runs;
    own: (N,) int32, 0..N-1. still: (N,) int32 of zeros on the compute device."""

    came: torch.Tensor
    goes: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    own: torch.Tensor
    still: torch.Tensor


class CrossingSide(InStreamSide):
    """InStreamSide that maps rows elsewhere."""

    @abstractmethod
    def _reached(self, numbers: torch.Tensor) -> torch.Tensor:
        """A copy of what lies in host memory, where the compute device's kernels and the secure device reach it."""

    @abstractmethod
    def _map(self, crossing: Crossing, maps: Maps, alone: bool) -> None:
        """Launch what rotates and maps rows of projections: q, k and v of a token one behind the other. alone: no two
        of a session."""

    @abstractmethod
    def _unmap(self, crossing: Crossing, out_map: torch.Tensor, alone: bool) -> None:
        """Launch what undoes the map of the values in rows of attention outputs."""

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        from tessera_kernels.triton_crossing import carry
        from tessera_kernels.triton_rope_store import rope_store

        self._carry, self._store = carry, rope_store
        self._unturned = torch.zeros(1, 2, self.shape.head_dim // 2, device=self.compute)  # a rotation by nothing
        self._unturned[:, 0] = 1
        self._rooms: list[Room] = []  # the largest last; a graph goes on using those that were outgrown
        return super()._make_tables()

    def _room(self, rows: int) -> Room:
        """Memory for so many rows at least."""
        if not self._rooms or self._rooms[-1].own.shape[0] < rows:
            shape = self.shape
            width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
            came, goes = (torch.zeros(rows * width * dtype.itemsize, dtype=torch.uint8)
                          for dtype in (self._wide, self.dtype))  # fmt: skip
            none = torch.zeros(rows, dtype=torch.int32)
            made = (came, goes, none, none, torch.arange(rows, dtype=torch.int32))
            came, goes, positions, slots, own = map(self._reached, made)
            still = torch.zeros(rows, dtype=torch.int32, device=self.compute)
            self._rooms.append(Room(came, goes, positions, slots, own, still))
        return self._rooms[-1]

    def _over(
        self, rows: torch.Tensor, dtype: torch.dtype, places: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Crossing:
        """Rows (N, W), or parts of them (P, N, W), into memory that both reach, as `dtype`; beside them positions and
        slots."""
        count, width = rows.shape[-2:]
        room = self._room(count)
        came, goes = (room_of.view(kind)[: count * width].view(count, width)
                      for room_of, kind in ((room.came, dtype), (room.goes, self.dtype)))  # fmt: skip
        crossing = Crossing(came, goes, room.positions[:count], room.slots[:count], room.own[:count])
        self._carry(rows, came, None if places is None else (*places, crossing.positions, crossing.tables))
        return crossing

    def encode_store(
        self, layer: int, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See SecureSide; qkv may also be (P, N, ...) float32 parts that add up to the projections."""
        maps = self._encoding(layer, qkv, batch)
        slots, rows = batch.places
        first = layer == self.config.layers[0]  # positions and slots are the whole step's
        crossing = self._over(qkv, self._wide, (batch.positions, slots) if first else None)
        self._map(crossing, maps, one_each(batch))
        still = self._room(slots.shape[0]).still[: slots.shape[0]]
        return self._store(crossing.goes, self._unturned, still, slots, k, v, self.shape.heads, rows=rows,
                           out=torch.empty(slots.shape[0], self.shape.heads, self.shape.head_dim, dtype=self.dtype,
                                           device=self.compute) if out is None else out)  # fmt: skip

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        maps = self._decoding(layer, attended, batch)
        crossing = self._over(attended, self.dtype)
        self._unmap(crossing, maps.out, one_each(batch))
        landed = torch.empty(crossing.goes.shape, dtype=self.dtype, device=self.compute)
        self._carry(crossing.goes, landed)
        return landed
