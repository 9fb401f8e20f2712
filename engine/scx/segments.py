"""A fresh key for every B tokens of a session: attention runs once a key, and the parts are merged.

A key's tokens are a segment. Keys and values are stored under their segment's maps; a query is encoded for every
segment it looks at, so it has one row for each; every row's output comes with the logarithm of its softmax sum, and the
secure side decodes the rows and merges those of a query. Plain PyTorch and slow: each segment costs its own pass.
Source: the merge is that of split keys in FlashAttention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from engine.attention.base import Caps, placed
from engine.runner.batch import Batch
from engine.scx.errors import ShapeMismatch
from engine.scx.schemes import Maps, maps_of
from engine.scx.secure import Encoded, LocalSecureSide, SecureSide, Session, Step, clear
from tessera_kernels.head_maps import Rows, encode_reference, map_heads


class Part(NamedTuple):
    """Rows first..last - 1 of the queries: those of one chunk that see one segment. Token rows start at `token`, the
    first query's position is `position`, keys are begin..end - 1 of the slot."""

    slot: int
    segment: int
    first: int
    last: int
    token: int
    position: int
    begin: int
    end: int


def parts_of(batch: Batch, size: int) -> list[Part]:
    """Every (chunk, segment) of a batch in the order of the query rows. size: tokens of a segment."""
    host = batch.host or batch
    parts: list[Part] = []
    row = 0
    starts = host.q_starts.tolist()
    for b, (slot, kv_len) in enumerate(zip(host.slots.tolist(), host.kv_lens.tolist(), strict=True)):
        start = kv_len - (starts[b + 1] - starts[b])
        for segment in range(-(-kv_len // size)):
            position = max(start, segment * size)  # queries before it see nothing of this segment
            last = row + kv_len - position
            token = starts[b] + position - start
            end = min((segment + 1) * size, kv_len)
            parts.append(Part(slot, segment, row, last, token, position, segment * size, end))
            row = last
    return parts


class SegmentBackend:
    """AttentionBackend over parts. size: tokens of a segment; scale: of scores."""

    caps = Caps(device="any", dtypes=("float32", "bfloat16", "float16"))

    def __init__(self, size: int, scale: float) -> None:
        self._size, self._scale = size, scale

    @classmethod
    def missing(cls) -> str | None:
        """Nothing: PyTorch is always here."""
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """q: (R, H, D), one row for each query and segment; k, v: slabs. Returns (R, H * (D + 1)) float32: a head's
        output, normalised within the segment, then the logarithm of its sum."""
        assert window == 0  # refused by the configuration
        heads, groups = q.shape[1], k.shape[2]
        found = torch.empty((q.shape[0], heads, q.shape[2] + 1), dtype=torch.float32, device=q.device)
        for part in parts_of(batch, self._size):
            queries = q[part.first : part.last].transpose(0, 1).float()  # (H, n, D)
            keys, values = (slab[part.slot, part.begin : part.end].transpose(0, 1).float() for slab in (k, v))
            keys, values = (side.repeat_interleave(heads // groups, dim=0) for side in (keys, values))  # (H, len, D)
            at = torch.arange(part.position, part.position + queries.shape[1], device=q.device)[:, None]
            hidden = torch.arange(part.begin, part.end, device=q.device)[None] > at
            scores = (queries @ keys.mT * self._scale).masked_fill(hidden, float("-inf"))
            total = scores.logsumexp(dim=-1, keepdim=True)  # (H, n, 1)
            done = torch.cat([(scores - total).exp() @ values, total], dim=-1)
            found[part.first : part.last] = done.transpose(0, 1)
        return placed(found.flatten(1), out)


class SegmentedSide(LocalSecureSide):
    """LocalSecureSide with a key a segment; its queries have one row for each segment they see (parts_of)."""

    def _make_tables(self) -> list[Maps]:
        return []  # maps are a session's, not a slot's: their number grows

    def _fill(self, slot: int, session: Session) -> None:
        """Nothing yet: a segment's maps are derived when its first token comes."""

    def encode(self, layer: int, qkv: torch.Tensor, batch: Batch) -> Encoded:
        """See SecureSide; q is (R, H, D)."""
        place, step = self._claim(layer, qkv, batch)
        heads, groups = self.shape.heads, self.shape.kv_heads
        parts = parts_of(batch, self.config.segment_tokens)
        source, tables, own = self._layout(parts, step)
        maps = self._maps_of(parts, place)
        wide = Rows(step.rows.positions[source], step.rows.slots[source], tables)
        received = qkv.to(self.device)
        rows = encode_reference(received[source], self._rope, wide, maps.q, maps.k, maps.v, heads,
                                dtype=self.dtype)  # fmt: skip
        clear(maps)
        self._count(qkv.nbytes, rows.nbytes)
        q, k, v = rows.to(self.compute).split([heads, groups, groups], dim=1)
        own = own.to(self.compute)
        return Encoded(q.contiguous(), k[own], v[own])

    encode_store = SecureSide.encode_store  # its rows are not the slab's: no kernel for both

    def decode(self, layer: int, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See SecureSide; attended is (R, H * (D + 1)), as SegmentBackend returns it, the result (N, H * D)."""
        place, step = self._awaited(layer, batch)
        heads, dim = self.shape.heads, self.shape.head_dim
        parts = parts_of(batch, self.config.segment_tokens)
        source, tables, _ = self._layout(parts, step)
        if tuple(attended.shape) != (source.shape[0], heads * (dim + 1)):
            raise ShapeMismatch(f"layer {layer}: {tuple(attended.shape)} is not the output of the scheduled rows")
        self._awaiting[place] = None
        received = attended.to(self.device).view(-1, heads, dim + 1)
        maps = self._maps_of(parts, place)
        outputs = map_heads(received[:, :, :dim].contiguous(), maps.out, tables)
        clear(maps)
        merged = merge(outputs, received[:, :, dim], source, step.rows.tables.shape[0])
        decoded = merged.to(self.dtype).flatten(1)
        self._count(attended.nbytes, decoded.nbytes)
        return decoded.to(self.compute)

    def _maps_of(self, parts: list[Part], place: int) -> Maps:
        """Maps (len(parts), G, D[, D]) of one layer, a row for each part; those not known yet are derived. A copy, for
        the caller to clear."""
        chosen = []
        for part in parts:
            session = self._sessions[part.slot]
            while len(session.segments) <= part.segment:
                shape, segment = self.shape, len(session.segments)
                maps = maps_of(self.scheme, session.keys, self.config.layers, shape.kv_heads, shape.head_dim, segment)
                session.segments.append(Maps(*(made.to(self.device) for made in maps)))
            chosen.append([made[place] for made in session.segments[part.segment]])
        return Maps(*(torch.stack(column) for column in zip(*chosen, strict=True)))

    def _layout(self, parts: list[Part], step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each query row: its token row and its part; for each token row: the query row of its own segment."""
        source = np.concatenate([np.arange(p.token, p.token + p.last - p.first) for p in parts])
        tables: np.ndarray = np.repeat(np.arange(len(parts), dtype=np.int32), [p.last - p.first for p in parts])
        own: np.ndarray = np.empty(step.rows.tables.shape[0], dtype=np.int64)
        for part in parts:
            count = max(0, part.end - part.position)  # the part's tokens that this step adds
            own[part.token : part.token + count] = np.arange(part.first, part.first + count)
        return tuple(torch.from_numpy(made).to(self.device) for made in (source, tables, own))  # type: ignore[return-value]


def merge(outputs: torch.Tensor, sums: torch.Tensor, source: torch.Tensor, count: int) -> torch.Tensor:
    """outputs (R, H, D) and logarithms of softmax sums (R, H) of parts; row r belongs to query source[r] of `count`.
    Returns (count, H, D): each query's attention over all its parts."""
    top = torch.full((count, sums.shape[1]), float("-inf"), device=sums.device)
    top.scatter_reduce_(0, source[:, None].expand_as(sums), sums, "amax")
    weights = (sums - top[source]).exp()  # (R, H)
    total = torch.zeros_like(top).index_add_(0, source, weights)
    mixed = torch.zeros((count, *outputs.shape[1:]), device=outputs.device)
    mixed.index_add_(0, source, outputs * weights[:, :, None])
    return mixed / total[:, :, None]
