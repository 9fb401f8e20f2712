"""Secure sides whose every answer is a launch in the order of the compute device's stream; and that device as one.

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
from engine.scx.secure import LocalSecureSide, SealOrder, Session, Step, clear, one_layer

STAGING_BYTES = 64 << 20  # of host memory for what is on its way, where that is enough for two sessions
MOST_STAGED = 64


class Staging:
    """Host memory through which a session's numbers travel. What was sent is cleared as soon as somebody looks and the
    device is through with it. compute: the device that uses it, of whose stream pinned memory is read."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, compute: torch.device, *, pinned: bool = True
    ) -> None:
        self._on_gpu = compute.type == "cuda"
        self._pinned = pinned and self._on_gpu
        each = int(np.prod(shape)) * dtype.itemsize
        self._count = min(MOST_STAGED, max(2, STAGING_BYTES // max(1, each)))
        self._shape, self._dtype = shape, dtype
        self._free: list[torch.Tensor] = []
        self._sent: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []  # oldest first

    def send(self, fill: Callable[[torch.Tensor], None], use: Callable[[torch.Tensor], None]) -> None:
        """Let `fill` write, and let `use` launch what reads it. Waits only while all of the memory is on its way."""
        self.sweep(wait=len(self._sent) >= self._count)
        if self._free:
            staged = self._free.pop()
        else:
            staged = torch.zeros(self._shape, dtype=self._dtype, pin_memory=self._pinned)
        done = None
        try:
            fill(staged)
            use(staged)
        finally:
            if self._on_gpu:
                done = torch.cuda.Event()
                done.record()
            self._sent.append((staged, done))

    def sweep(self, *, wait: bool = False) -> None:
        """Clear what is done with. wait: for the oldest, at least."""
        while self._sent:
            staged, done = self._sent[0]
            if done is not None and wait:
                done.synchronize()
            if done is not None and not done.query():
                return
            wait = False
            clear((staged,))
            self._free.append(self._sent.pop(0)[0])

    def drain(self) -> None:
        """Clear everything, waiting for it."""
        while self._sent:
            self.sweep(wait=True)


class InStreamSide(LocalSecureSide):
    """LocalSecureSide that answers a GPU by launches alone, with one key a session. Slots and positions of rows are
    read where the batch has them; what is counted, and refused, is counted on the host."""

    in_stream = True
    _staging: Staging

    def _wipe(self, slot: int, session: Session) -> None:
        """See LocalSecureSide. Behind whatever still runs with these maps."""
        session.keys.clear()
        self._clear_maps(slot)
        self._staging.sweep()

    def _clear_maps(self, slot: int) -> None:
        clear((self._whole[slot],))

    def shut(self) -> None:
        """See SecureSide."""
        super().shut()
        self._staging.drain()

    def _step_of(self, batch: Batch) -> Step:
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
        self._count(rows * there, rows * back, calls=2 * layers)

    def _encoding(self, layer: int, qkv: torch.Tensor, batch: Batch) -> Maps:
        """The maps of a layer whose rows are encoded now, counted unless they are being recorded."""
        if not self.recording:
            rows = qkv if qkv.dim() == 2 else qkv[0]
            self._claim(layer, rows, batch)
            self._count(rows.numel() * self._wide.itemsize, rows.numel() * self.dtype.itemsize)
        return self._tables[self._place_of(layer)]

    def _decoding(self, layer: int, attended: torch.Tensor, batch: Batch) -> Maps:
        """The same for attention outputs."""
        place = self._place_of(layer)
        if not self.recording:
            place, step = self._awaited(layer, batch)
            self._check_output(layer, attended, step)
            self._awaiting[place] = None
            self._count(attended.nbytes, attended.nbytes)
        return self._tables[place]

    @property
    def _wide(self) -> torch.dtype:
        """The type in which projections come, whatever parts a product was cut into."""
        return torch.float32 if self.scheme.matrices else self.dtype

    def seal(self, layer: int, batch: Batch) -> SealOrder | None:
        """See SecureSide."""
        full = self._sent(self._orders((layer,), batch))
        return None if full is None else one_layer(full)

    def seal_all(self, batch: Batch) -> SealOrder | None:
        """See SecureSide."""
        return self._sent(self._orders(self.config.layers, batch))

    def _sent(self, full: SealOrder | None) -> SealOrder | None:
        """On the compute device: one copy, which nobody waits for."""
        if full is None:
            return None
        together = torch.cat([made.flatten().to(torch.int32) for made in full])
        if self.compute.type == "cuda":
            together = together.pin_memory().to(self.compute, non_blocking=True)
        slots, firsts, order = together.split([made.numel() for made in full])
        return SealOrder(slots, firsts, order.view(full.order.shape))


class DeviceSecureSide(InStreamSide):
    """The secure side on the compute device."""

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        from tessera_kernels import triton_decode_heads, triton_encode_heads

        self._encode, self._decode = triton_encode_heads.encode_store, triton_decode_heads.decode_heads
        room = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
        self._staging = Staging(tuple(room.shape), room.dtype, self.compute)
        return super()._make_tables()

    def _fill(self, slot: int, session: Session) -> None:
        """Draw what a session's maps are made of and send it; the maps are made on the device."""

        def make(staged: torch.Tensor) -> None:
            there = staged.to(self.device, non_blocking=True)
            self.scheme.make(there, self._whole[slot])
            if there is not staged:
                clear((there,))

        self._staging.send(lambda staged: self.scheme.draw(session.keys, self.config.layers, 0, staged), make)

    def encode_store(
        self, layer: int, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See SecureSide; qkv may also be (P, N, ...) float32 parts that add up to the projections."""
        maps = self._encoding(layer, qkv, batch)
        slots, places = batch.places
        return self._encode(qkv, self._rope, batch.positions, slots, (maps.q, maps.k, maps.v), k, v, self.shape.heads,
                            one_each=one_each(batch), rows=places, out=out)  # fmt: skip

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        maps = self._decoding(layer, attended, batch)
        return self._decode(attended, batch.places[0], maps.out, self.shape.heads, one_each=one_each(batch))


def one_each(batch: Batch) -> bool:
    """Whether every token of a batch is another sequence's."""
    return batch.slots.shape[0] == batch.positions.shape[0]
