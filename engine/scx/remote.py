"""The engine's hand on a secure worker: SecureSide over a socket and shared memory. It holds slot numbers, no keys.

A worker that hangs up, dies or stays silent is lost, and every session with it: what needs one raises WorkerLost, and
nothing goes on in plaintext. The next open() tries the same address again. What encode(), seal() and decode() return
on a CPU are views of shared memory, whole until the next call.
"""

from __future__ import annotations

import logging
import threading
from typing import cast

import msgspec
import torch

from engine.core.clock import Clock, MonotonicClock
from engine.core.errors import ConfigError
from engine.runner.batch import Batch
from engine.scx import frames
from engine.scx.config import OWN_WORKER, UNIX, ScxConfig
from engine.scx.errors import (
    LayerNotEncoded,
    OutOfOrder,
    ScxError,
    ShapeMismatch,
    UnknownSession,
    WorkerLost,
    WorkerRefused,
)
from engine.scx.link import Answer, Link, OwnWorker
from engine.scx.schemes import schemes
from engine.scx.secure import Encoded, HeadShape, SealOrder, SecureSide, Traffic

log = logging.getLogger(__name__)

START_S = 60.0  # for a worker of our own to load
FIND_S = 5.0  # for somebody else's to be there when the engine starts
AGAIN_S = 1.0  # between attempts to reach a lost one, and the longest that one attempt waits for its first answer
PIN_LIMIT_BYTES = 2 << 30  # a region above it stays pageable


class RemoteSecureSide(SecureSide):
    """SecureSide by a worker. config.secure_device: `worker` (started here) or `unix:PATH`. dtype: of encoded rows;
    step_tokens: rows of the largest step; rope: (P, 2, D/2) float32. Raises ConfigError when none can be reached.
    """

    def __init__(
        self, config: ScxConfig, shape: HeadShape, rope: torch.Tensor, model: bytes, compute: torch.device, *,
        dtype: torch.dtype, step_tokens: int, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.config, self.shape, self.compute, self._rope = config, shape, compute, rope
        self.traffic = Traffic()
        self._clock = clock or MonotonicClock()
        self._geometry = geometry_of(config, shape, rope, model, dtype, step_tokens)
        self._own = OwnWorker(config.key_file) if config.secure_device == OWN_WORKER else None
        self._path = self._own.path if self._own is not None else config.secure_device.removeprefix(UNIX)
        self._link: Link | None = None
        self._opened: set[int] = set()  # slots with a session of the present connection
        self._batch: Batch | None = None
        self._step = 0
        self._encoded: tuple[int, int, int] = (-1, 0, 0)  # layer encoded last, its rows of q, its full blocks
        self._retry_s = 0.0
        self._pinned: frames.Region | None = None
        try:
            self._reach(START_S if self._own is not None else FIND_S)
        except (ScxError, ConfigError) as error:
            self.shut()
            absent = self._own is None and isinstance(error, WorkerLost)
            hint = f"; start one: python -m engine.scx.secure_worker --socket {self._path}" if absent else ""
            raise ConfigError(f"--scx-secure-device {config.secure_device}: {error}{hint}") from None

    # ------------------------------------------------------------ the connection

    def _reach(self, patience_s: float) -> None:
        """Connect, as soon as somebody listens. Raises ScxError."""
        end_s = self._clock.now_s() + patience_s
        pause = threading.Event()
        while True:
            try:
                self._connect(patience_s)
                return
            except WorkerLost:
                if self._own is not None and not self._own.alive:
                    raise WorkerLost(f"the secure worker ended with status {self._own.status}; see its log") from None
                if self._clock.now_s() > end_s:
                    raise
                pause.wait(0.05)

    def _connect(self, first_answer_s: float) -> None:
        link = Link(self._path, self._clock, first_answer_s)
        try:
            link.greet(self._geometry, self._rope)
        except ScxError:
            link.close()
            raise
        self._link, self._step = link, 0
        self._pin(link.region)

    def _pin(self, region: frames.Region | None) -> None:
        """Make copies between a GPU and the region need no staging."""
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.bytes.data_ptr())
            self._pinned = None
        if region is not None and self.compute.type == "cuda" and region.bytes.nbytes <= PIN_LIMIT_BYTES:
            failed = int(torch.cuda.cudart().cudaHostRegister(region.bytes.data_ptr(), region.bytes.nbytes, 0))
            if failed:
                log.warning("SCX: the shared region of %d bytes is not pinned (CUDA error %d)", region.bytes.nbytes,
                            failed)
            else:
                self._pinned = region

    def _lose(self, error: ScxError) -> WorkerLost:
        """Forget the worker and every session. Returns what to raise."""
        if self._link is not None:
            log.error("SCX: %s; requests with encoded layers end with an error until it is back", error)
            self._pin(None)
            self._link.close()
            self._link = None
            self._opened.clear()
            self._batch = None
            self._retry_s = 0.0
        return error if isinstance(error, WorkerLost) else WorkerLost(f"the secure worker refused: {error}")

    def _again(self) -> Link:
        """A connection to open a session on; a lost worker is tried at most once in AGAIN_S. Raises WorkerLost."""
        if self._link is not None:
            return self._link
        if self._own is not None:
            self._own.start()
        begin_s = self._clock.now_s()
        if begin_s < self._retry_s:
            raise WorkerLost("the secure worker is lost; it is tried again in a moment")
        try:
            self._connect(AGAIN_S)
        except ScxError as error:
            now_s = self._clock.now_s()
            self._retry_s = now_s + AGAIN_S + 4 * (now_s - begin_s)  # a silent one must not hold up every step
            raise self._lose(error) from None
        log.warning("SCX: the secure worker is back; new requests get sessions of their own")
        assert self._link is not None
        return self._link

    def _call(self, link: Link, message: msgspec.Struct, kind: type[Answer]) -> Answer:
        try:
            return link.call(message, kind)
        except (WorkerLost, WorkerRefused) as error:
            raise self._lose(error) from None

    # ------------------------------------------------------------ sessions

    def open(self, slot: int, nonce: bytes, *, tenant: bytes = b"", epoch: int = 0) -> str:
        """See SecureSide. Raises WorkerLost."""
        link = self._again()
        try:
            opened = self._call(link, frames.Open(slot, nonce, tenant, epoch), frames.Opened)
        except WorkerLost:  # noticed only now: it may be back already
            opened = self._call(self._again(), frames.Open(slot, nonce, tenant, epoch), frames.Opened)
        self._opened.add(slot)
        return opened.namespace

    def holds(self, slot: int) -> bool:
        """See SecureSide."""
        return slot in self._opened

    def close(self, slot: int) -> None:
        """See SecureSide."""
        if slot not in self._opened or self._link is None:
            return
        self._opened.discard(slot)
        try:
            self._link.send(frames.Close(slot))
        except WorkerLost as error:
            self._lose(error)

    def shut(self) -> None:
        """See SecureSide: hang up, which makes the worker forget; a worker of our own ends."""
        self._pin(None)
        if self._link is not None:
            self._link.close()
            self._link = None
        self._opened.clear()
        if self._own is not None:
            self._own.close()

    # ------------------------------------------------------------ rows

    def _ready(self, layer: int, batch: Batch) -> tuple[Link, frames.Region, list[frames.Chunk] | None]:
        """The connection, its region, and the batch's chunks if it is a new step. Raises WorkerLost, LayerNotEncoded,
        and UnknownSession where the present connection has no session of a slot."""
        link = self._link
        if link is None or link.region is None:
            raise WorkerLost("the secure worker is lost, and with it the sessions of running requests")
        if layer not in self.config.layers:
            raise LayerNotEncoded(f"layer {layer} is not one of {', '.join(map(str, self.config.layers))}")
        if batch is self._batch:
            return link, link.region, None
        host = batch.host or batch
        starts, slots, ends = host.q_starts.tolist(), host.slots.tolist(), host.kv_lens.tolist()
        for slot in slots:
            if slot not in self._opened:
                raise UnknownSession(f"layer {layer}: slot {slot} has no open session")
        chunks = [frames.Chunk(slot, end - (starts[i + 1] - starts[i]), end)
                  for i, (slot, end) in enumerate(zip(slots, ends, strict=True))]  # fmt: skip
        return link, link.region, chunks

    def _put(self, region: frames.Region, rows: torch.Tensor, dtype: torch.dtype, width: int) -> None:
        """Rows into the inbox. From a GPU this waits for the copy."""
        if rows.dtype is not dtype or rows.dim() != 2 or rows.shape[1] != width:
            raise ShapeMismatch(f"{tuple(rows.shape)} of {rows.dtype} is not (rows, {width}) of {dtype}")
        try:
            region.inbox(rows.shape, dtype).copy_(rows)
        except ValueError as error:
            raise ShapeMismatch(f"{rows.shape[0]} rows: {error}") from None
        self.traffic.calls += 1
        self.traffic.bytes_in += rows.nbytes

    def encode(self, layer: int, qkv: torch.Tensor, batch: Batch) -> Encoded:
        """See SecureSide."""
        link, region, chunks = self._ready(layer, batch)
        heads, groups, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        if qkv.shape[0] != batch.num_tokens:
            raise ShapeMismatch(f"layer {layer}: {tuple(qkv.shape)} for {batch.num_tokens} scheduled rows")
        self._put(region, qkv, frames.DTYPES[self._geometry.projected], (heads + 2 * groups) * dim)
        if chunks is not None:
            self._step += 1
            self._batch = batch
        answer = self._call(link, frames.Encode(self._step, layer, chunks), frames.Encoded)
        count = qkv.shape[0]
        sizes = [answer.queries * heads * dim, count * groups * dim, count * groups * dim]
        rows = region.outbox((sum(sizes),))
        self.traffic.bytes_out += rows.nbytes
        self._encoded = (layer, answer.queries, answer.blocks)
        q, k, v = rows.to(self.compute).split(sizes)
        return Encoded(q.view(-1, heads, dim), k.view(count, groups, dim), v.view(count, groups, dim))

    def seal(self, layer: int, batch: Batch) -> SealOrder | None:
        """See SecureSide; the blocks came with the encoded rows."""
        last, _, blocks = self._encoded
        if self._link is None or self._link.region is None:
            raise WorkerLost("the secure worker is lost")
        if last != layer or batch is not self._batch:
            raise OutOfOrder(f"layer {layer}: blocks of rows that were not the last ones encoded")
        if not blocks:
            return None
        places, order = self._link.region.seals(blocks)
        slots, firsts = places.to(self.compute)
        return SealOrder(slots, firsts, order.to(self.compute).long())

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        link, region, chunks = self._ready(layer, batch)
        last, queries, _ = self._encoded
        if chunks is not None or last != layer:
            raise OutOfOrder(f"layer {layer}: rows to decode that were not the last ones encoded")
        if attended.shape[0] != queries:
            raise ShapeMismatch(f"layer {layer}: {tuple(attended.shape)} is not the output of the scheduled rows")
        segmented = self.config.segment_tokens > 0
        width = self.shape.heads * (self.shape.head_dim + segmented)
        self._put(region, attended, torch.float32 if segmented else self._geometry.torch_dtype, width)
        self._call(link, frames.Decode(self._step, layer), frames.Decoded)
        decoded = region.outbox((batch.num_tokens, self.shape.heads * self.shape.head_dim))
        self.traffic.bytes_out += decoded.nbytes
        return decoded.to(self.compute)


def geometry_of(
    config: ScxConfig, shape: HeadShape, rope: torch.Tensor, model: bytes, dtype: torch.dtype, step_tokens: int
) -> frames.Geometry:
    """What the handshake says. Raises ConfigError for what no worker takes."""
    names = {known: name for name, known in frames.DTYPES.items()}
    try:
        made = frames.Geometry(
            model=model, scheme=config.scheme, layers=list(config.layers), seal_tokens=config.seal_tokens,
            segment_tokens=config.segment_tokens, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            slots=shape.slots, max_tokens=rope.shape[0], step_tokens=step_tokens,
            dtype=cast(frames.Dtype, names[dtype]),
            projected="float32" if schemes[config.scheme].matrices else cast(frames.Dtype, names[dtype]),
        )  # fmt: skip
        return frames.decode_geometry(frames.encode(made))  # the ranges are checked where frames are read
    except (KeyError, ValueError, msgspec.DecodeError) as error:
        raise ConfigError(f"a secure worker does not take this model: {error}") from None

