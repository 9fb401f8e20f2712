"""The secure side on another GPU of the machine: rows cross by NVLink or PCIe, and the same kernels map them there.

The compute device's kernels write rows into the other's memory and read them from it; the other maps them in a stream
of its own, each launch between two events, so that a CUDA graph of the compute device may hold all of it. Keys are in
this process, but maps never lie in the memory of the device that attends: who reads that one alone does not have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.scx.crossing import CrossingSide
from engine.scx.on_device import Staging
from engine.scx.schemes import Maps
from engine.scx.secure import Session, clear
from tessera_kernels.host_jobs import Crossing


def reachable(compute: torch.device, secure: torch.device) -> bool:
    """Whether kernels of one GPU can address the memory of the other."""
    return torch.cuda.can_device_access_peer(compute, secure)


class PeerSecureSide(CrossingSide):
    """The secure side on a GPU that the compute device reaches, with one key a session."""

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        from tessera_kernels.triton_decode_heads import decode_heads
        from tessera_kernels.triton_encode_heads import encode_store

        self._encode, self._decode = encode_store, decode_heads
        on_gpu = self.compute.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        tables = super()._make_tables()
        if on_gpu:
            torch.zeros(1, device=self.compute).to(self.device)  # PyTorch opens the way at the first copy
            torch.cuda.synchronize(self.device)  # tables were made in another stream
        room = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
        self._staging = Staging(tuple(room.shape), room.dtype, self.compute)
        return tables

    @contextmanager
    def _there(self) -> Iterator[None]:
        """What is launched inside runs on the secure device, between what the compute device's stream was told before
        and what it is told behind."""
        if self._stream is None:
            yield
            return
        here = torch.cuda.current_stream(self.compute)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)

    # ------------------------------------------------------------ sessions

    def _fill(self, slot: int, session: Session) -> None:
        """Draw what a session's maps are made of and send it; the maps are made on the secure device."""

        def make(staged: torch.Tensor) -> None:
            with self._there():
                there = staged.to(self.device, non_blocking=True)
                self.scheme.make(there, self._whole[slot])
                if there is not staged:
                    clear((there,))

        self._staging.send(lambda staged: self.scheme.draw(session.keys, self.config.layers, 0, staged), make)

    def _clear_maps(self, slot: int) -> None:
        with self._there():
            super()._clear_maps(slot)

    def shut(self) -> None:
        """See SecureSide. Waits for what still clears maps: their memory may be another's afterwards."""
        super().shut()
        if self._stream is not None:
            self._stream.synchronize()

    # ------------------------------------------------------------ rows

    def _reached(self, numbers: torch.Tensor) -> torch.Tensor:
        with self._there():
            return numbers.to(self.device, copy=True)

    def _map(self, crossing: Crossing, maps: Maps, alone: bool) -> None:
        came, goes, positions, slots, own = crossing
        shape, rows = self.shape, goes.shape[0]
        q, k, v = goes.view(rows, -1, shape.head_dim).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        k, v = (each.expand(shape.slots, *each.shape) for each in (k, v))  # token n's place is row n in every slot
        with self._there():
            self._encode(came, self._rope, positions, slots, (maps.q, maps.k, maps.v), k, v, shape.heads,
                         one_each=alone, rows=own, out=q)  # fmt: skip

    def _unmap(self, crossing: Crossing, out_map: torch.Tensor, alone: bool) -> None:
        with self._there():
            self._decode(crossing.came, crossing.tables, out_map, self.shape.heads, one_each=alone,
                         out=crossing.goes)  # fmt: skip
