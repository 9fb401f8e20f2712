"""The secure side on the CPU of a GPU's machine, in the GPU's stream: down, mapped in C++, up again; nobody waits.

An encode is three kernels: all rows' projections into pinned memory, a call of the thread that maps them
(kernels/host_jobs.py), and the store into the slabs, which reads q, k and v where that thread left them; a decode is
the same with a copy in place of the store. All of it may stand in a CUDA graph, and the thread that launches steps is
never held up. A session's maps are written, and cleared, by jobs in the stream too: behind the steps that still run
with what was there. It is no isolation: keys and maps are in this process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.runner.batch import Batch
from engine.scx.on_device import InStreamSide, Staging
from engine.scx.schemes import Maps, map_dtype
from engine.scx.secure import Session, clear
from tessera_kernels import host_jobs


class Room(NamedTuple):
    """Memory for N rows, pinned where there is a GPU. came, goes: bytes; positions, slots: (N,) int32 of the step that
    runs. own: (N,) int32, 0..N-1. still: (N,) int32 of zeros on the compute device."""

    came: torch.Tensor
    goes: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    own: torch.Tensor
    still: torch.Tensor


class HostSecureSide(InStreamSide):
    """The secure side on the CPU, with one key a session.

    by_bell: jobs are called by a word of memory (host_jobs.Bell), not as host functions of the driver; None: where
    there are cores enough.
    """

    by_bell: bool | None = None

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        from tessera_kernels.triton_crossing import carry
        from tessera_kernels.triton_rope_store import rope_store

        self._carry, self._store = carry, rope_store
        by_bell = host_jobs.bell_pays() if self.by_bell is None else self.by_bell
        self._bell = host_jobs.Bell() if by_bell and self.compute.type == "cuda" else None
        tables = super()._make_tables()
        self._staging = Staging(tuple(self._whole.shape[1:]), map_dtype(self.scheme), self.compute, pinned=False)
        self._unturned = torch.zeros(1, 2, self.shape.head_dim // 2, device=self.compute)  # a rotation by nothing
        self._unturned[:, 0] = 1
        self._rooms: list[Room] = []  # the largest last; a graph goes on using those that were outgrown
        return tables

    # ------------------------------------------------------------ sessions

    def _fill(self, slot: int, session: Session) -> None:
        """Derive a session's maps, and let the stream write them into its place."""

        def derive(staged: torch.Tensor) -> None:
            drawn = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
            try:
                self.scheme.draw(session.keys, self.config.layers, 0, drawn)
                with torch.inference_mode():  # as what is staged may have been made
                    self.scheme.make(drawn, staged)
            finally:
                clear((drawn,))

        self._staging.send(derive, lambda staged: host_jobs.copy(self._whole[slot], staged, self.compute))

    def _clear_maps(self, slot: int) -> None:
        host_jobs.copy(self._whole[slot], None, self.compute)

    def shut(self) -> None:
        """See SecureSide. Waits until no job is left: they know memory by its address."""
        super().shut()
        if self.compute.type == "cuda":
            torch.cuda.synchronize(self.compute)
        if self._bell is not None:
            self._bell.stop()

    # ------------------------------------------------------------ rows

    def _room(self, rows: int) -> Room:
        """Memory for so many rows at least."""
        if not self._rooms or self._rooms[-1].own.shape[0] < rows:
            shape, pinned = self.shape, self.compute.type == "cuda"
            width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
            came, goes = (torch.zeros(rows * width * dtype.itemsize, dtype=torch.uint8, pin_memory=pinned)
                          for dtype in (self._wide, self.dtype))  # fmt: skip
            positions, slots = (torch.zeros(rows, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
            self._rooms.append(Room(came, goes, positions, slots, torch.arange(rows, dtype=torch.int32),
                                    torch.zeros(rows, dtype=torch.int32, device=self.compute)))  # fmt: skip
        return self._rooms[-1]

    def _down(
        self, rows: torch.Tensor, dtype: torch.dtype, places: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> host_jobs.Crossing:
        """Rows (N, W), or parts of them (P, N, W), into pinned memory as `dtype`; beside them positions and slots."""
        count, width = rows.shape[-2:]
        room = self._room(count)
        came, goes = (room_of.view(kind)[: count * width].view(count, width)
                      for room_of, kind in ((room.came, dtype), (room.goes, self.dtype)))  # fmt: skip
        crossing = host_jobs.Crossing(came, goes, room.positions[:count], room.slots[:count], room.own[:count])
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
        crossing = self._down(qkv, self._wide, (batch.positions, slots) if first else None)
        host_jobs.encode(crossing, self._rope, (maps.q, maps.k, maps.v), self.shape.heads, self.compute, self._bell)
        still = self._room(slots.shape[0]).still[: slots.shape[0]]
        return self._store(crossing.goes, self._unturned, still, slots, k, v, self.shape.heads, rows=rows,
                           out=torch.empty(slots.shape[0], self.shape.heads, self.shape.head_dim, dtype=self.dtype,
                                           device=self.compute) if out is None else out)  # fmt: skip

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        maps = self._decoding(layer, attended, batch)
        crossing = self._down(attended, self.dtype)
        host_jobs.decode(crossing, maps.out, self.shape.heads, self.compute, self._bell)
        landed = torch.empty(crossing.goes.shape, dtype=self.dtype, device=self.compute)
        self._carry(crossing.goes, landed)
        return landed
