"""The secure side on the compute device itself: every answer is a launch, in the order of that device's stream.

What a session's maps are made of is drawn on the host and travels once, when it is opened; the maps are made on the
device, in its slot's row of a table that never moves. So encodes and decodes may stand in a CUDA graph, and the rows
of a step are then claimed before it is replayed. It is no isolation: maps lie in the memory of the device that attends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.runner.batch import Batch
from engine.scx.schemes import Maps, row_bytes
from engine.scx.secure import LocalSecureSide, SealOrder, Session, Step, clear

STAGING_BYTES = 64 << 20  # of host memory for what is on its way, where that is enough for two sessions
MOST_STAGED = 64


class Staging:
    """Host memory through which a session's numbers travel, pinned where they go to a GPU. What was sent is cleared as
    soon as somebody looks and it has arrived."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        each = int(np.prod(shape)) * dtype.itemsize
        self._count = min(MOST_STAGED, max(2, STAGING_BYTES // max(1, each)))
        self._shape, self._dtype = shape, dtype
        self._free: list[torch.Tensor] = []
        self._sent: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []  # oldest first

    def send(self, fill: Callable[[torch.Tensor], None], use: Callable[[torch.Tensor], None]) -> None:
        """Let `fill` write, start the copy, and let `use` start what reads it on the device. Waits only while all of
        the memory is on its way."""
        self.sweep(wait=len(self._sent) >= self._count)
        if self._free:
            staged = self._free.pop()
        else:
            staged = torch.zeros(self._shape, dtype=self._dtype, pin_memory=self._pinned)
        arrived = None
        try:
            fill(staged)
            there = staged.to(self._device, non_blocking=True)
            use(there)
            if self._pinned:
                clear((there,))
                arrived = torch.cuda.Event()
                arrived.record()
        finally:
            self._sent.append((staged, arrived))

    def sweep(self, *, wait: bool = False) -> None:
        """Clear what has arrived. wait: for the oldest, at least."""
        while self._sent:
            staged, arrived = self._sent[0]
            if arrived is not None and wait:
                arrived.synchronize()
            if arrived is not None and not arrived.query():
                return
            wait = False
            clear((staged,))
            self._free.append(self._sent.pop(0)[0])

    def drain(self) -> None:
        """Clear everything, waiting for it."""
        while self._sent:
            self.sweep(wait=True)


class DeviceSecureSide(LocalSecureSide):
    """LocalSecureSide whose device is the compute device, with one key a session."""

    in_stream = True

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        from tessera_kernels import triton_decode_heads, triton_encode_heads

        self._encode, self._decode = triton_encode_heads.encode_store, triton_decode_heads.decode_heads
        room = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
        self._staging = Staging(tuple(room.shape), room.dtype, self.device)
        return super()._make_tables()

    # ------------------------------------------------------------ sessions

    def _fill(self, slot: int, session: Session) -> None:
        """Draw what a session's maps are made of and send it; the maps are made on the device."""
        self._staging.send(lambda staged: self.scheme.draw(session.keys, self.config.layers, 0, staged),
                           lambda arrived: self.scheme.make(arrived, self._whole[slot]))

    def _wipe(self, slot: int, session: Session) -> None:
        """See LocalSecureSide. Behind whatever still runs with these maps."""
        session.keys.clear()
        clear((self._whole[slot],))
        self._staging.sweep()

    def shut(self) -> None:
        """See SecureSide."""
        super().shut()
        self._staging.drain()

    # ------------------------------------------------------------ rows

    def _step_of(self, batch: Batch) -> Step:
        """Counted on the host; kernels read slots and positions where the batch has them."""
        if self._step is None or self._step.batch is not batch:
            self._step = Step.of(batch, torch.device("cpu"))
        return self._step

    def claim(self, batch: Batch) -> None:
        """See SecureSide."""
        step = self._step_of(batch)
        behind = (self._next[:, step.slots] != step.starts).any(axis=1)
        self._expect(self.config.layers[int(behind.argmax())], step)  # the first that is not where the step begins
        self._next[:, step.slots] = step.ends
        self._awaiting = [step] * len(self.config.layers)
        shape, layers = self.shape, len(self.config.layers)
        there, back = row_bytes(self.config.scheme, shape.heads, shape.kv_heads, shape.head_dim, self.dtype.itemsize)
        rows = layers * step.rows.positions.shape[0]
        self._crossed(2 * layers, rows * there, rows * back)

    def _crossed(self, calls: int, incoming_bytes: int, outgoing_bytes: int) -> None:
        """Count what would cross if the secure side were another device."""
        self.traffic.calls += calls
        self.traffic.bytes_in += incoming_bytes
        self.traffic.bytes_out += outgoing_bytes

    def encode_store(
        self, layer: int, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See SecureSide; qkv may also be (P, N, ...) float32 parts that add up to the projections."""
        if not self.recording:
            rows = qkv if qkv.dim() == 2 else qkv[0]
            self._claim(layer, rows, batch)
            wide_bytes = 4 if self.scheme.matrices else self.dtype.itemsize  # whatever parts a product was cut into
            self._crossed(1, rows.numel() * wide_bytes, rows.numel() * self.dtype.itemsize)
        maps = self._tables[self._place_of(layer)]
        slots, places = batch.places
        return self._encode(qkv, self._rope, batch.positions, slots, (maps.q, maps.k, maps.v), k, v, self.shape.heads,
                            one_each=one_each(batch), rows=places, out=out)  # fmt: skip

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        place = self._place_of(layer)
        if not self.recording:
            place, step = self._awaited(layer, batch)
            self._check_output(layer, attended, step)
            self._awaiting[place] = None
            self._crossed(1, attended.nbytes, attended.nbytes)
        return self._decode(attended, batch.places[0], self._tables[place].out, self.shape.heads,
                            one_each=one_each(batch))  # fmt: skip

    def seal(self, layer: int, batch: Batch) -> SealOrder | None:
        """See SecureSide."""
        found = self._orders(layer, batch)
        if found is None or self.device.type == "cpu":
            return found
        sent = (made.pin_memory().to(self.device, non_blocking=True) for made in found)
        return SealOrder(*sent)


def one_each(batch: Batch) -> bool:
    """Whether every token of a batch is another sequence's."""
    return batch.slots.shape[0] == batch.positions.shape[0]
