"""What crosses between an engine and a secure worker: small frames on a socket, rows in shared memory.

Frames are msgpack of a fixed schema, one a packet (SOCK_SEQPACKET keeps their bounds); every number has a range. Rows
lie in one region whose size follows from the handshake: an area for each direction, so that a batch crosses in one
piece each way. It knows neither keys nor engines.

    engine: Hello(version, geometry)  -> worker: Welcome and the region's descriptor
            Start (rope in the inbox) ->         Ready
            Open(slot, nonce)         ->         Opened
            Encode(step, layer)       ->         Encoded: q | k | v in the outbox, sealed blocks behind them
            Decode(step, layer)       ->         Decoded: rows in the outbox
            Close(slot)               (no answer)
Anything may be answered by Refused. After one of kind WorkerRefused the worker hangs up.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch

VERSION = 2
MAX_FRAME_BYTES = 160 << 10  # below Linux's default limit of a packet; the largest is an Encode of MAX_SLOTS chunks
MAX_SLOTS = 8192
MAX_REGION_BYTES = 1 << 40  # of addresses: pages are taken when they are touched
NONCE_BYTES = 16
HEADER_BYTES = 4096  # the first eight bytes count the worker's beats
ALIGN_BYTES = 4096
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Slot = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
Small = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What both sides agree on for the life of a connection. model: a digest of the model's identity; max_tokens:
    positions of a slot, and of the rotary table; step_tokens: rows of the largest step; dtype: of encoded rows and of
    attention's output; projected: of projections, that or float32."""

    model: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    scheme: Annotated[str, msgspec.Meta(max_length=32)]
    layers: Annotated[list[Number], msgspec.Meta(min_length=1, max_length=4096)]
    seal_tokens: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    segment_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    heads: Small
    kv_heads: Small
    head_dim: Small
    slots: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    step_tokens: Positive
    dtype: Dtype
    projected: Dtype

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.heads} heads over {self.kv_heads} KV heads of {self.head_dim} entries")
        if any(low >= high for low, high in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError("layers do not rise")
        if self.seal_tokens == 1 or (self.segment_tokens and self.seal_tokens
                                     and self.segment_tokens % self.seal_tokens):
            raise ValueError(f"blocks of {self.seal_tokens} tokens in segments of {self.segment_tokens}")
        if self.projected not in (self.dtype, "float32"):
            raise ValueError(f"projections of {self.projected} for rows of {self.dtype}")
        if areas(self).total_bytes > MAX_REGION_BYTES:
            raise ValueError(f"a shared region above {MAX_REGION_BYTES} bytes")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the rows."""
        return DTYPES[self.dtype]


class Areas(NamedTuple):
    """Where a region's parts begin [bytes]; each begins on a page."""

    inbox: int
    outbox: int
    seals: int
    total_bytes: int


def areas(geometry: Geometry) -> Areas:
    """The layout that follows from a geometry. The inbox also brings the rotary table, once."""
    g, item = geometry, geometry.torch_dtype.itemsize
    queries = g.step_tokens * (-(-g.max_tokens // g.segment_tokens) if g.segment_tokens else 1)
    attended = queries * g.heads * ((g.head_dim + 1) * 4 if g.segment_tokens else g.head_dim * item)
    projected = g.step_tokens * (g.heads + 2 * g.kv_heads) * g.head_dim * DTYPES[g.projected].itemsize
    encoded = (queries * g.heads + 2 * g.step_tokens * g.kv_heads) * g.head_dim * item
    blocks = g.step_tokens // g.seal_tokens + g.slots if g.seal_tokens else 0
    sizes = (HEADER_BYTES, max(attended, projected, g.max_tokens * g.head_dim * 4), encoded,
             blocks * (16 + 2 * g.kv_heads * g.seal_tokens))  # fmt: skip
    ends = [0]
    for size in sizes:
        ends.append(-(-(ends[-1] + size) // ALIGN_BYTES) * ALIGN_BYTES)
    return Areas(*ends[1:])


class Chunk(NamedTuple):
    """Positions start..end - 1 of a slot."""

    slot: Slot
    start: Number
    end: Positive


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello", array_like=True):
    """The first frame. geometry: a Geometry, read only once the version is known to be ours."""

    version: Number
    geometry: msgspec.Raw


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="start", array_like=True):
    """The rotary table is in the inbox: float32 (max_tokens, 2, D/2)."""


class Open(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="open", array_like=True):
    """Start a session on a free slot."""

    slot: Slot
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    tenant: Annotated[bytes, msgspec.Meta(max_length=256)]
    epoch: Number


class Close(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="close", array_like=True):
    """End a slot's session; without one, nothing happens."""

    slot: Slot


class Encode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="e", array_like=True):
    """Encode the projections in the inbox. chunks: of a new step; None: of the step that is going on."""

    step: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
    layer: Number
    chunks: Annotated[list[Chunk], msgspec.Meta(min_length=1, max_length=MAX_SLOTS)] | None


class Decode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="d", array_like=True):
    """Decode the attention output in the inbox."""

    step: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
    layer: Number


FromEngine = Hello | Start | Open | Close | Encode | Decode


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome", array_like=True):
    """The region's descriptor comes with this frame."""

    version: Number


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready", array_like=True):
    """Sessions may be opened."""


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opened", array_like=True):
    """namespace: the key's name (see SessionKeys)."""

    namespace: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class Encoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="E", array_like=True):
    """queries: rows of q; blocks: that are full now and change their order."""

    queries: Number
    blocks: Number


class Decoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="D", array_like=True):
    """As many rows as the step has."""


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused", array_like=True):
    """kind: the name of an ScxError. The message has slots, layers and positions, never contents."""

    kind: Annotated[str, msgspec.Meta(max_length=32)]
    message: Annotated[str, msgspec.Meta(max_length=1024)]


FromWorker = Welcome | Ready | Opened | Encoded | Decoded | Refused

encode = msgspec.msgpack.Encoder().encode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_geometry = msgspec.msgpack.Decoder(Geometry).decode


def make_region(geometry: Geometry) -> int:
    """The descriptor of a new region that nobody can resize, so that no access to it can fault."""
    descriptor = os.memfd_create("tessera-scx", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, areas(geometry).total_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


class Region:
    """The shared memory of a connection, mapped; closes the descriptor unless it is to be kept.

    Raises ValueError for one of another size, or whose size may still change. What inbox() and outbox() return are
    views: the other side may write them at any time it should not, which garbles rows and nothing else.
    """

    def __init__(self, descriptor: int, geometry: Geometry, *, keep: bool = False) -> None:
        self._geometry, self.areas = geometry, areas(geometry)
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise ValueError("the shared region can be resized")
            if os.fstat(descriptor).st_size != self.areas.total_bytes:
                raise ValueError("the shared region has another size than was agreed")
            self._memory = mmap.mmap(descriptor, self.areas.total_bytes)
        finally:
            if not keep:
                os.close(descriptor)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def beat(self, count: int) -> None:
        """The worker's sign of life: a number that changes."""
        struct.pack_into("<Q", self._memory, 0, count)

    def beats(self) -> int:
        """The last sign of life."""
        return int(struct.unpack_from("<Q", self._memory, 0)[0])

    def _view(self, start: int, end: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > end - start:
            raise ValueError(f"{size} bytes in an area of {end - start}")
        return self.bytes[start : start + size].view(dtype).view(*shape)

    def inbox(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """What goes to the worker, as a tensor; in the rows' type unless another is named."""
        return self._view(self.areas.inbox, self.areas.outbox, shape, dtype or self._geometry.torch_dtype)

    def outbox(self, shape: Sequence[int]) -> torch.Tensor:
        """What comes from the worker."""
        return self._view(self.areas.outbox, self.areas.seals, shape, self._geometry.torch_dtype)

    def seals(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots and firsts (2, P) int64, order (P, G, B) int16) of sealed blocks."""
        start, end, g = self.areas.seals, self.areas.total_bytes, self._geometry
        places = self._view(start, end, (2, blocks), torch.int64)
        order = (blocks, g.kv_heads, g.seal_tokens)
        return places, self._view(start + 16 * blocks, end, order, torch.int16)
