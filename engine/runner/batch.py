"""One step as tensors: the ragged batch that models, kernels and attention backends take as an argument.

It holds what kernels need to find a sequence's cache: slot numbers and lengths. There are no block tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Row:
    """One chunk, ready to pack: its slot, its tokens and where they start."""

    slot: int
    start: int
    tokens: Sequence[int]
    samples: bool


class Span(NamedTuple):
    """A chunk of the batch in numbers the host knows: token rows first..last - 1 of `slot`, kv_len tokens cached."""

    slot: int
    first: int
    last: int
    kv_len: int


@dataclass(frozen=True, slots=True)
class Paged:
    """Where a paged store keeps a step's tokens; slabs need none of this.

    table: (S, M) int32, block m of a slot holds its tokens m * block_tokens and on; host_table: the same in host
    memory. blocks, rows: (N,) int32, where each token of the batch is written.
    """

    table: torch.Tensor
    host_table: np.ndarray
    block_tokens: int
    blocks: torch.Tensor
    rows: torch.Tensor


@dataclass(slots=True)
class Batch:
    """N tokens of B chunks, one after the other.

    tokens: (N,) integer; -1 = the newest token of that slot, which only the device knows.
    positions: (N,) int32, absolute. token_slots: (N,) int32.
    slots: (B,) int32. q_starts: (B + 1,) int32, chunk b is tokens q_starts[b]:q_starts[b + 1].
    kv_lens: (B,) int32, tokens in the cache once this step has written its own.
    sample_rows: (R,) integer, the token rows that get logits.
    spans: the first chunks, up to the last that has more than one token; the chunks behind them are one token each.
    So a backend can run prompts and decodes by different kernels without asking a device for numbers.
    ends: (2, R) int32, slot and kv_len of each chunk that has a row in sample_rows; None where nobody asks.
    paged: for backends over block tables, what a paged store adds (KvStore.place).
    host: the same batch in host memory, where this one lies on a device and came from there.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    slots: torch.Tensor
    q_starts: torch.Tensor
    kv_lens: torch.Tensor
    sample_rows: torch.Tensor
    spans: tuple[Span, ...] = ()
    ends: torch.Tensor | None = None
    paged: Paged | None = None
    host: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device: one copy from pinned memory, which the launches behind it need not wait for."""
        if device.type == "cpu":
            return self
        ends = self.sample_rows[:0] if self.ends is None else self.ends.flatten()
        fields = (self.tokens, self.positions, self.token_slots, self.slots, self.q_starts, self.kv_lens,
                  self.sample_rows, ends)  # fmt: skip
        staged = torch.empty(sum(field.shape[0] for field in fields), dtype=torch.int32, pin_memory=True)
        torch.cat([field.to(torch.int32) for field in fields], out=staged)
        moved = staged.to(device, non_blocking=True).split([field.shape[0] for field in fields])
        tokens, positions, token_slots, slots, q_starts, kv_lens, rows, ends = moved
        known = None if self.ends is None else ends.view(2, -1)
        return Batch(tokens, positions, token_slots, slots, q_starts, kv_lens, rows, self.spans, known, host=self)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) int32 each: first and second index of the (S, C, G, D) views at which a token's K and V are written."""
        if self.paged is not None:
            return self.paged.blocks, self.paged.rows
        return self.token_slots, self.positions

    def split(self) -> tuple[Batch, Batch]:
        """(spans, the decodes behind them) as two batches that share this one's memory; nothing is sampled of them."""
        tokens, prompts = self.num_prefill_tokens, len(self.spans)
        hosts = self.host.split() if self.host is not None else (None, None)
        none = self.sample_rows[:0]
        first = Batch(self.tokens[:tokens], self.positions[:tokens], self.token_slots[:tokens], self.slots[:prompts],
                      self.q_starts[: prompts + 1], self.kv_lens[:prompts], none, self.spans, paged=self.paged,
                      host=hosts[0])  # fmt: skip
        rest = Batch(self.tokens[tokens:], self.positions[tokens:], self.token_slots[tokens:], self.slots[prompts:],
                     self.q_starts[prompts:] - tokens, self.kv_lens[prompts:], none, paged=self.paged,
                     host=hosts[1])  # fmt: skip
        return first, rest

    def widened(self, rows: int) -> Batch:
        """The same with `rows` rows that get logits: those behind its own R stand for no sequence (token row 0, slot
        -1, length 0), and nothing of them is meant. For a batch of pack()."""
        more = rows - self.sample_rows.shape[0]
        if more <= 0 or self.ends is None:
            return self
        nobody = torch.tensor([[-1], [0]], dtype=self.ends.dtype).expand(2, more)
        return replace(self, sample_rows=F.pad(self.sample_rows, (0, more)), ends=torch.cat([self.ends, nobody], dim=1))

    def sampling(self) -> Batch | None:
        """The last tokens of the chunks that sample, one row each, as a batch of decodes; nothing is stored of it. None
        where every row is such a token already."""
        if self.ends is None or not self.spans:
            return None
        slots, kv_lens = self.ends
        rows = torch.arange(slots.shape[0] + 1, dtype=torch.int32, device=slots.device)
        host = self.host.sampling() if self.host is not None else None
        return Batch(rows[:-1], kv_lens - 1, slots, slots, rows, kv_lens, rows[:-1], paged=self.paged, host=host)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.tokens.shape[0]

    @property
    def num_prefill_tokens(self) -> int:
        """Token rows of `spans`; the rows behind are decodes, one a chunk."""
        return self.spans[-1].last if self.spans else 0


def pack(rows: Sequence[Row]) -> Batch:
    """Lay chunks end to end. rows: at least one, each of at least one token, at most one row a slot."""
    lengths = np.fromiter((len(row.tokens) for row in rows), dtype=np.int32, count=len(rows))
    starts = np.fromiter((row.start for row in rows), dtype=np.int32, count=len(rows))
    slots = np.fromiter((row.slot for row in rows), dtype=np.int32, count=len(rows))
    q_starts: np.ndarray = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=q_starts[1:])
    total = int(q_starts[-1])
    tokens = np.fromiter((token for row in rows for token in row.tokens), dtype=np.int64, count=total)
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - q_starts[:-1], lengths)
    longer = np.flatnonzero(lengths > 1)
    prompts = int(longer[-1]) + 1 if longer.size else 0
    spans = tuple(
        Span(rows[b].slot, int(q_starts[b]), int(q_starts[b + 1]), rows[b].start + int(lengths[b]))
        for b in range(prompts)
    )
    samples = np.fromiter((row.samples for row in rows), dtype=np.bool_, count=len(rows))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        token_slots=torch.from_numpy(np.repeat(slots, lengths)),
        slots=torch.from_numpy(slots),
        q_starts=torch.from_numpy(q_starts),
        kv_lens=torch.from_numpy(starts + lengths),
        sample_rows=torch.from_numpy((q_starts[1:][samples] - 1).astype(np.int64)),
        spans=spans,
        ends=torch.from_numpy(np.stack([slots[samples], (starts + lengths)[samples]])),
    )
