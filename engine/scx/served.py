"""One engine's connection as the secure worker sees it: frames in, answers out, sessions of a LocalSecureSide.

Every number of a frame is checked against the geometry agreed on; what rows may be asked for is the local side's rule.
It does not know sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from engine.runner.batch import Batch
from engine.scx import frames
from engine.scx.config import ScxConfig
from engine.scx.errors import OutOfOrder, ShapeMismatch, UnknownSession, WorkerRefused
from engine.scx.keys import Secret
from engine.scx.schemes import map_bytes, schemes
from engine.scx.secure import HeadShape, LocalSecureSide
from engine.scx.segments import SegmentedSide


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker gives to an engine. device: where maps lie; table_bytes: of maps and rotary table, at most."""

    device: str
    table_bytes: int


class Served:
    """Answers one engine. root: a copy, cleared with the connection. ready: the handshake is done.

    counts: sessions opened and closed, rows encoded and decoded.
    """

    def __init__(self, root: Secret, limits: Limits, own_nonce: Callable[[int], bytes]) -> None:
        self._root, self._limits, self._own_nonce = root, limits, own_nonce
        self.region: frames.Region | None = None
        self.counts = {"opened": 0, "closed": 0, "encoded_rows": 0, "decoded_rows": 0}
        self._descriptor: int | None = None
        self._geometry: frames.Geometry | None = None
        self._side: LocalSecureSide | None = None
        self._step = 0
        self._batch: Batch | None = None
        self._queries = 0  # rows of q in the layer encoded last

    @property
    def ready(self) -> bool:
        """Whether sessions can be opened."""
        return self._side is not None

    def take_descriptor(self) -> int | None:
        """The region's descriptor once, to send with the answer."""
        taken, self._descriptor = self._descriptor, None
        return taken

    def close(self) -> None:
        """Clear every session and the root's copy. Idempotent."""
        if self._side is not None:
            self._side.shut()
        self._root.clear()
        self.region = None

    @torch.inference_mode()
    def answer(self, raw: bytes) -> frames.FromWorker | None:
        """Answer a frame; None where none is due. Raises ScxError; after WorkerRefused the connection must end."""
        try:
            message = frames.decode_from_engine(raw)
        except (msgspec.DecodeError, ValueError):
            raise WorkerRefused("a frame outside the schema") from None
        if isinstance(message, frames.Hello):
            return self._hello(message)
        if isinstance(message, frames.Start):
            return self._start()
        if self._side is None or self._geometry is None or self.region is None:
            raise WorkerRefused("no handshake came before this frame")
        if isinstance(message, frames.Encode):
            return self._encode(message, self._side, self._geometry, self.region)
        if isinstance(message, frames.Decode):
            return self._decode(message, self._side, self._geometry, self.region)
        if isinstance(message, frames.Open):
            if message.slot >= self._geometry.slots:
                raise UnknownSession(f"slot {message.slot} is outside 0..{self._geometry.slots - 1}")
            nonce = message.nonce + self._own_nonce(frames.NONCE_BYTES)
            name = self._side.open(message.slot, nonce, tenant=message.tenant, epoch=message.epoch)
            self.counts["opened"] += 1
            return frames.Opened(name)
        self.counts["closed"] += 1
        self._side.close(message.slot)
        return None

    def _hello(self, message: frames.Hello) -> frames.FromWorker:
        if self._geometry is not None:
            raise WorkerRefused("a second handshake")
        if message.version != frames.VERSION:
            raise WorkerRefused(f"protocol version {message.version}; this worker speaks {frames.VERSION}")
        try:
            geometry = frames.decode_geometry(message.geometry)
        except (msgspec.DecodeError, ValueError):
            raise WorkerRefused("a geometry outside the schema") from None
        if geometry.scheme not in schemes.names():
            raise WorkerRefused(f"no such scheme; this worker has {', '.join(schemes.names())}")
        need = table_bytes(geometry)
        if need > self._limits.table_bytes:
            each = "segments of a request" if geometry.segment_tokens else f"{geometry.slots} slots"
            raise WorkerRefused(f"maps of {each} and {len(geometry.layers)} layers take {need} bytes and --limit-bytes "
                                f"is {self._limits.table_bytes}; raise it, encode fewer layers or lower "
                                f"{'--max-model-len' if geometry.segment_tokens else '--max-num-seqs'}")
        self._geometry = geometry
        self._descriptor = frames.make_region(geometry)
        self.region = frames.Region(self._descriptor, geometry, keep=True)
        return frames.Welcome(frames.VERSION)

    def _start(self) -> frames.FromWorker:
        g, region = self._geometry, self.region
        if g is None or region is None or self._side is not None:
            raise WorkerRefused("a start that no handshake came before")
        config = ScxConfig(layers=tuple(g.layers), secure_device=self._limits.device, scheme=g.scheme,
                           seal_tokens=g.seal_tokens, segment_tokens=g.segment_tokens)  # fmt: skip
        shape = HeadShape(g.heads, g.kv_heads, g.head_dim, g.slots, g.max_tokens)
        rope = region.inbox((g.max_tokens, 2, g.head_dim // 2), torch.float32)
        make = SegmentedSide if g.segment_tokens else LocalSecureSide
        self._side = make(config, shape, rope, self._root, g.model, torch.device("cpu"), g.torch_dtype)
        return frames.Ready()

    def _encode(
        self, message: frames.Encode, side: LocalSecureSide, g: frames.Geometry, region: frames.Region
    ) -> frames.FromWorker:
        if message.chunks is None:
            if message.step != self._step or self._batch is None:
                raise OutOfOrder(f"step {message.step} is not going on")
        elif message.step <= self._step:
            raise OutOfOrder(f"step {message.step} after step {self._step}")
        else:
            self._batch = batch_of(message.chunks, g)
            self._step = message.step
        batch = self._batch
        count = batch.num_tokens
        qkv = region.inbox((count, (g.heads + 2 * g.kv_heads) * g.head_dim), frames.DTYPES[g.projected])
        parts = side.encode(message.layer, qkv, batch)
        sizes = [part.numel() for part in parts]
        for part, into in zip(parts, region.outbox((sum(sizes),)).split(sizes), strict=True):
            into.view(part.shape).copy_(part)
        self._queries = parts.q.shape[0]
        self.counts["encoded_rows"] += count
        sealed = side.seal(message.layer, batch) if g.seal_tokens else None
        if sealed is None:
            return frames.Encoded(self._queries, 0)
        places, order = region.seals(sealed.slots.shape[0])
        places.copy_(torch.stack([sealed.slots, sealed.firsts]))
        order.copy_(sealed.order)
        return frames.Encoded(self._queries, order.shape[0])

    def _decode(
        self, message: frames.Decode, side: LocalSecureSide, g: frames.Geometry, region: frames.Region
    ) -> frames.FromWorker:
        if message.step != self._step or self._batch is None:
            raise OutOfOrder(f"step {message.step} is not going on")
        if g.segment_tokens:
            attended = region.inbox((self._queries, g.heads * (g.head_dim + 1)), torch.float32)
        else:
            attended = region.inbox((self._batch.num_tokens, g.heads * g.head_dim))
        decoded = side.decode(message.layer, attended, self._batch)
        region.outbox(decoded.shape).copy_(decoded)
        self.counts["decoded_rows"] += decoded.shape[0]
        return frames.Decoded()


def table_bytes(geometry: frames.Geometry) -> int:
    """What maps of all slots and the rotary table take [bytes]; with segments, the maps that one session can reach."""
    g = geometry
    sets = -(-g.max_tokens // g.segment_tokens) if g.segment_tokens else g.slots
    return sets * map_bytes(g.scheme, len(g.layers), g.kv_heads, g.head_dim) + g.max_tokens * g.head_dim * 4


def batch_of(chunks: Sequence[frames.Chunk], geometry: frames.Geometry) -> Batch:
    """A step's chunks as the batch that the local side takes. Raises ShapeMismatch for one outside the geometry."""
    g = geometry
    total = 0
    for slot, start, end in chunks:
        if slot >= g.slots or not start < end <= g.max_tokens:
            raise ShapeMismatch(f"positions {start}..{end - 1} of slot {slot} are outside 0..{g.max_tokens - 1} of "
                                f"0..{g.slots - 1}")
        total += end - start
    if total > g.step_tokens:
        raise ShapeMismatch(f"{total} rows in a step of at most {g.step_tokens}")
    slots, starts, ends = np.array(chunks, dtype=np.int32).T.copy()
    q_starts: np.ndarray = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(ends - starts, out=q_starts[1:])
    tokens = torch.empty(total, dtype=torch.int8)  # what they are, and rows one by one, is not the worker's business
    none = tokens[:0]
    return Batch(tokens, none, none, torch.from_numpy(slots), torch.from_numpy(q_starts), torch.from_numpy(ends), none)
