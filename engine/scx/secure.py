"""The secure side: it holds the keys, and rotates, encodes and decodes the rows that a step has scheduled.

`SecureSide` is what a model's pieces call, whoever answers. `LocalSecureSide` answers in this process, on a torch
device of its own: that is no isolation, only the right arithmetic (docs/scx.md). It does not know weights, queues or
who asks. A row of a session is encoded once for each layer, in the order of positions, and its output decoded once, so
that whoever calls gains no oracle beyond the rows that ran.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from engine.runner.batch import Batch
from engine.scx.config import ScxConfig
from engine.scx.errors import LayerNotEncoded, OutOfOrder, ShapeMismatch, UnknownSession
from engine.scx.keys import Scope, Secret, SessionKeys, permutations
from engine.scx.schemes import Maps, map_dtype, map_shape, named, schemes
from tessera_kernels.head_maps import Rows, decode, encode, encode_store


class Encoded(NamedTuple):
    """What may leave the secure side: q (N, H, D), k and v (N, G, D), on the compute device, in its dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class SealOrder(NamedTuple):
    """Blocks whose rows change places now: slots and first tokens (P,); order (P, G, B), where row j of the block
    becomes what was row order[j]. int64, or int32 where a kernel reads it."""

    slots: torch.Tensor
    firsts: torch.Tensor
    order: torch.Tensor

    def __repr__(self) -> str:
        return "<SealOrder>"


@dataclass(slots=True)
class Traffic:
    """What crossed. calls: encodes and decodes; bytes to and from the secure side."""

    calls: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The attention that is encoded: heads, KV heads, entries of a head; slots and tokens a slot."""

    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    max_tokens: int


class SecureSide(ABC):
    """Encodes and decodes; see the module. Every method raises an ScxError rather than answering in plaintext."""

    traffic: Traffic
    in_stream = False  # whether its answers are launches alone, which a graph may hold; then it has claim()
    recording = False  # whether what it launches now is being recorded, and belongs to no step yet

    @abstractmethod
    def open(self, slot: int, nonce: bytes, *, tenant: bytes = b"", epoch: int = 0) -> str:
        """Start a session on a free slot. Returns its key namespace (see SessionKeys). nonce: 16 bytes, never used
        before with this root. Raises UnknownSession when one is open there."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """End a session and clear what was derived for it. Without one, nothing happens."""

    def holds(self, slot: int) -> bool:
        """Whether a session that was opened on a slot is still there: False once it was lost with its holder."""
        return True

    @abstractmethod
    def encode(self, layer: int, qkv: torch.Tensor, batch: Batch) -> Encoded:
        """qkv: (N, (H + 2G) * D), the projections of the batch's rows before rotation, in the type of encoded rows; for
        schemes of matrices in float32, since they are rounded once they are mapped."""

    def encode_store(
        self, layer: int, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """encode(), with k' and v' written to their places in the slabs k, v (S, C, G, D). Returns q', in `out` where
        given."""
        encoded = self.encode(layer, qkv, batch)
        where = (batch.token_slots.long(), batch.positions.long())
        k[where], v[where] = encoded.k, encoded.v
        return encoded.q if out is None else out.copy_(encoded.q)

    def claim(self, batch: Batch) -> None:
        """Where in_stream: a step whose encodes and decodes are replayed has its rows counted in every layer at once.
        Raises an ScxError, and nothing of the step may run."""
        raise OutOfOrder("this secure side answers calls; nothing of it can be replayed")

    @abstractmethod
    def seal(self, layer: int, batch: Batch) -> SealOrder | None:
        """The blocks that this step's rows made full, in the layer encoded last; between its encode and its decode."""

    def seal_all(self, batch: Batch) -> SealOrder | None:
        """Where in_stream: the same for all encoded layers, behind a step that was claimed: order is (L, P, G, B)."""
        raise OutOfOrder("this secure side answers calls; nothing of it can be replayed")

    @abstractmethod
    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """attended: (N, H * D), the attention output of the rows encoded last in this layer. Same shape, decoded."""

    @abstractmethod
    def shut(self) -> None:
        """End every session and forget the root. Idempotent."""


@dataclass(eq=False, slots=True)
class Step:
    """A batch in numbers the host knows; chunk b writes positions starts[b]..ends[b] - 1 of slots[b]."""

    batch: Batch
    slots: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    rows: Rows

    @staticmethod
    def of(batch: Batch, device: torch.device) -> Step:
        """Made from chunks alone: a position that a caller invents is not looked at. Raises OutOfOrder for a slot
        that stands in two chunks."""
        host = batch.host or batch
        slots, ends = host.slots.numpy().astype(np.int64), host.kv_lens.numpy().astype(np.int64)
        counts = np.diff(host.q_starts.numpy()).astype(np.int64)
        starts = ends - counts
        if len(set(slots.tolist())) != len(slots):
            raise OutOfOrder(f"a step has two chunks of one slot among {slots.tolist()}")
        total = int(counts.sum())
        firsts: np.ndarray = np.repeat(starts - (np.cumsum(counts) - counts), counts)
        positions = torch.from_numpy((np.arange(total) + firsts).astype(np.int32)).to(device)
        of_rows = torch.from_numpy(np.repeat(slots, counts).astype(np.int32)).to(device)
        return Step(batch, slots, starts, ends, Rows(positions, of_rows, of_rows))


@dataclass(slots=True, repr=False)
class Session:
    """An open session of the local side. Like Maps and SealOrder it has no text form that tells what is in it."""

    keys: SessionKeys
    segments: list[Maps] = field(default_factory=list)  # with --scx-segment-tokens: maps (L, ...) of each segment


class LocalSecureSide(SecureSide):
    """SecureSide on a torch device of this process. rope: (P, 2, D/2) float32; compute: where answers go, in dtype.

    Maps of all sessions lie in tables by slot, so that one operation serves a whole batch.
    """

    def __init__(
        self, config: ScxConfig, shape: HeadShape, rope: torch.Tensor, root: Secret, model: bytes,
        compute: torch.device, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.config, self.shape, self.dtype = config, shape, dtype
        self.compute, self.device = indexed(compute), indexed(torch.device(config.secure_device))
        self.scheme = schemes[config.scheme]()
        self.traffic = Traffic()
        self._scope, self._root = Scope(model, config.scheme), root
        self._rope = rope.to(self.device, copy=True)  # its own copy: the model's stays where it is
        self._place = {layer: i for i, layer in enumerate(config.layers)}
        self._sessions: dict[int, Session] = {}
        # position to encode next, by layer and slot; -1 = no session
        self._next: np.ndarray = np.full((len(config.layers), shape.slots), -1, dtype=np.int64)
        self._awaiting: list[Step | None] = [None] * len(config.layers)  # encoded, not yet decoded
        self._step: Step | None = None
        self._tables = self._make_tables()

    def _make_tables(self) -> list[Maps]:
        """For each layer, maps (slots, G, D[, D]): views of one table (slots, T, L, G, D[, D]), so that a session's
        maps lie together; zeros where no session is. map_bytes() says what it takes."""
        shape, layers = self.shape, len(self.config.layers)
        row = map_shape(self.scheme, layers, shape.kv_heads, shape.head_dim)
        self._whole = torch.zeros((shape.slots, *row), dtype=map_dtype(self.scheme), device=self.device)
        return [named(layer.unbind(1)) for layer in self._whole.unbind(2)]

    # ------------------------------------------------------------ sessions

    def open(self, slot: int, nonce: bytes, *, tenant: bytes = b"", epoch: int = 0) -> str:
        """See SecureSide."""
        if not 0 <= slot < self.shape.slots:
            raise UnknownSession(f"slot {slot} is outside 0..{self.shape.slots - 1}")
        if slot in self._sessions:
            raise UnknownSession(f"slot {slot} has an open session; close it first")
        salt = b"static" if self.scheme.shared else nonce
        keys = SessionKeys(self._root, salt, self._scope, tenant=tenant, epoch=0 if self.scheme.shared else epoch)
        session = Session(keys)
        try:
            self._fill(slot, session)
        except BaseException:
            self._wipe(slot, session)
            raise
        self._sessions[slot] = session
        self._next[:, slot] = 0
        return keys.namespace

    def _fill(self, slot: int, session: Session) -> None:
        """Derive a session's maps into its place in the tables."""
        drawn = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
        try:
            self.scheme.draw(session.keys, self.config.layers, 0, drawn)
            self.scheme.make(drawn.to(self.device), self._whole[slot])
        finally:
            clear((drawn,))

    def close(self, slot: int) -> None:
        """See SecureSide."""
        session = self._sessions.pop(slot, None)
        if session is None:
            return
        self._wipe(slot, session)
        self._next[:, slot] = -1

    def _wipe(self, slot: int, session: Session) -> None:
        """Clear a session's key and maps."""
        session.keys.clear()
        for maps in (*session.segments, (self._whole[slot],) if self._tables else ()):
            clear(maps)

    def shut(self) -> None:
        """See SecureSide."""
        for slot in list(self._sessions):
            self.close(slot)
        self._root.clear()

    # ------------------------------------------------------------ rows

    def _claim(self, layer: int, qkv: torch.Tensor, batch: Batch) -> tuple[int, Step]:
        """The layer's place and the step, its rows now counted as encoded. Raises an ScxError."""
        place = self._place_of(layer)
        step = self._step_of(batch)
        shape = self.shape
        width, count = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, step.rows.positions.shape[0]
        if tuple(qkv.shape) != (count, width):
            raise ShapeMismatch(f"layer {layer}: {tuple(qkv.shape)} for scheduled rows of ({count}, {width})")
        self._expect(layer, step)
        self._next[place, step.slots] = step.ends
        self._awaiting[place] = step
        return place, step

    def _expect(self, layer: int, step: Step) -> None:
        """Raises an ScxError unless a step's rows are the next of their sessions in a layer, and not too many."""
        expected = self._next[self._place_of(layer), step.slots]
        if (expected != step.starts).any():
            wrong = int(np.flatnonzero(expected != step.starts)[0])
            slot, start, want = int(step.slots[wrong]), int(step.starts[wrong]), int(expected[wrong])
            if want < 0:
                raise UnknownSession(f"layer {layer}: slot {slot} has no open session")
            raise OutOfOrder(f"layer {layer}, slot {slot}: rows from position {start}, but {want} is next")
        if int(step.ends.max()) > self._rope.shape[0]:
            raise ShapeMismatch(f"position {int(step.ends.max()) - 1} is outside 0..{self._rope.shape[0] - 1}")

    def _place_of(self, layer: int) -> int:
        place = self._place.get(layer)
        if place is None:
            raise LayerNotEncoded(f"layer {layer} is not one of {', '.join(map(str, self.config.layers))}")
        return place

    def _step_of(self, batch: Batch) -> Step:
        """The batch's numbers, worked out once a step."""
        if self._step is None or self._step.batch is not batch:
            self._step = Step.of(batch, self.device)
        return self._step

    def _awaited(self, layer: int, batch: Batch) -> tuple[int, Step]:
        """The step that the layer encoded last, which must be this batch's. Raises OutOfOrder."""
        place = self._place_of(layer)
        step = self._awaiting[place]
        if step is None or step.batch is not batch:
            raise OutOfOrder(f"layer {layer}: rows to decode that were not the last ones encoded")
        return place, step

    def _count(self, incoming_bytes: int, outgoing_bytes: int, calls: int = 1) -> None:
        self.traffic.calls += calls
        self.traffic.bytes_in += incoming_bytes
        self.traffic.bytes_out += outgoing_bytes

    def encode(self, layer: int, qkv: torch.Tensor, batch: Batch) -> Encoded:
        """See SecureSide."""
        place, step = self._claim(layer, qkv, batch)
        maps, received = self._tables[place], qkv.to(self.device)
        buffer = torch.empty(qkv.numel(), dtype=self.dtype, device=self.device)
        done = encode(received, self._rope, step.rows, (maps.q, maps.k, maps.v), self.shape.heads, buffer)
        self._count(qkv.nbytes, buffer.nbytes)
        crossed = buffer.to(self.compute).split([part.numel() for part in done])  # one transfer for all three
        return Encoded(*(part.view(like.shape) for part, like in zip(crossed, done, strict=True)))

    def encode_store(
        self, layer: int, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See SecureSide. On one device rotation, maps and stores are one kernel, and k', v' exist in the slab only."""
        if self.device != self.compute:
            return super().encode_store(layer, qkv, batch, k, v, out)
        place, step = self._claim(layer, qkv, batch)
        maps = self._tables[place]
        self._count(qkv.nbytes, qkv.numel() * k.itemsize)
        return encode_store(qkv, self._rope, step.rows, (maps.q, maps.k, maps.v), k, v, self.shape.heads, out=out)

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide."""
        place, step = self._awaited(layer, batch)
        self._check_output(layer, attended, step)
        self._awaiting[place] = None
        table = self._tables[place].out
        decoded = decode(attended.to(self.device), step.rows.tables, table, self.shape.heads)
        self._count(attended.nbytes, decoded.nbytes)
        return decoded.to(self.compute)

    def _check_output(self, layer: int, attended: torch.Tensor, step: Step) -> None:
        if tuple(attended.shape) != (step.rows.tables.shape[0], self.shape.heads * self.shape.head_dim):
            raise ShapeMismatch(f"layer {layer}: {tuple(attended.shape)} is not the output of the scheduled rows")

    def seal(self, layer: int, batch: Batch) -> SealOrder | None:
        """See SecureSide."""
        full = self._orders((layer,), batch)
        return None if full is None else SealOrder(*(made.to(self.compute) for made in one_layer(full)))

    def _orders(self, layers: Sequence[int], batch: Batch) -> SealOrder | None:
        """What seal() tells, in host memory, for several layers: order is (L, P, G, B)."""
        steps = [self._awaited(layer, batch)[1] for layer in layers]
        size, step = self.config.seal_tokens, steps[0]
        full = zip(step.slots.tolist(), (step.starts // size).tolist(), (step.ends // size).tolist(), strict=True)
        ranges = [(slot, range(first, last)) for slot, first, last in full if first < last]
        if not ranges:
            return None
        orders = []
        for slot, blocks in ranges:
            grid = np.stack(np.meshgrid(layers, blocks, range(self.shape.kv_heads), indexing="ij"), axis=-1)
            labels = grid[..., [0, 2, 1]].reshape(-1, 3).astype(np.uint32)  # layer, head, block
            drawn = permutations(self._sessions[slot].keys, "row", labels, size)  # told to the compute device
            orders.append(drawn.reshape(len(layers), len(blocks), -1, size))
        slots, firsts = torch.tensor([[slot, b * size] for slot, blocks in ranges for b in blocks]).unbind(1)
        return SealOrder(slots, firsts, torch.from_numpy(np.concatenate(orders, axis=1)).long())


def one_layer(full: SealOrder) -> SealOrder:
    """Orders of several layers that are of one, as seal() tells them."""
    return full._replace(order=full.order[0])


def indexed(device: torch.device) -> torch.device:
    """The device by its full name: `cuda` and `cuda:0` are one and must compare equal."""
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def clear(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite with zeros, also what a step made in inference mode."""
    with torch.inference_mode():
        for tensor in tensors:
            tensor.zero_()
