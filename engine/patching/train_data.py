"""Token blocks for fine-tuning: documents end to end, cut into blocks, visited in an order that a seed fixes.

Which blocks a step sees follows from (seed, step) alone, so resuming needs no state of its own. It knows ids and
bytes; no model, no torch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.core.errors import ConfigError

BATCH_DOCUMENTS = 256


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """ids: [N, context] int32, block by block in corpus order; utf8_bytes: of the text, in all; sha256: of ids."""

    ids: Any
    documents: int
    tokens: int
    utf8_bytes: int
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    def steps_per_epoch(self, blocks_per_step: int) -> int:
        """Whole steps in one pass; the last, smaller one is left out."""
        return len(self.ids) // blocks_per_step

    def at_step(self, step: int, blocks_per_step: int, seed: int) -> npt.NDArray[np.int32]:
        """The blocks [blocks_per_step, context] of a step, counted from 0. Every epoch has an order of its own."""
        epoch, within = divmod(step, self.steps_per_epoch(blocks_per_step))
        order = np.random.default_rng([seed, epoch]).permutation(len(self.ids))
        chosen: npt.NDArray[np.int32] = self.ids[order[within * blocks_per_step : (within + 1) * blocks_per_step]]
        return chosen


def token_blocks(tokenizer: Any, documents: Iterable[str], context: int, separator: int | None = None) -> TokenBlocks:
    """Encode documents and cut them into blocks of `context` tokens; what is left at the end is dropped.

    tokenizer: engine.tokenization.Tokenizer. No special tokens are added; separator: an id put after each document,
    None = nothing, as in the paper. Raises ConfigError when the corpus does not fill one block.
    """
    ids: list[npt.NDArray[np.int32]] = []
    count = utf8_bytes = 0
    end = [] if separator is None else [separator]
    for texts in batched(documents, BATCH_DOCUMENTS):
        count += len(texts)
        utf8_bytes += sum(len(text.encode()) for text in texts)
        ids += [np.array([*encoded, *end], np.int32) for encoded in tokenizer.encode_batch(texts, False)]
    row = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    blocks = row[: len(row) - len(row) % context].reshape(-1, context)
    if not len(blocks):
        raise ConfigError(f"the corpus has {len(row)} tokens in {count} documents, less than one block of "
                          f"--context {context}; give more text or a smaller --context")
    return TokenBlocks(blocks, count, len(row), utf8_bytes, hashlib.sha256(blocks.tobytes()).hexdigest())


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def bytes_of_ids(tokenizer: Any) -> npt.NDArray[np.int64]:
    """UTF-8 bytes that each id stands for [V], 0 for specials: what turns nats a token into bits a byte."""
    return np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64)


@dataclass(frozen=True, slots=True)
class Window:
    """One piece of a document to score: ids, and from which position on they count (the ones before are context)."""

    ids: list[int]
    first: int


def windows(ids: list[int], context: int) -> Iterator[Window]:
    """Overlapping windows of at most `context` ids in which every id but the very first is scored exactly once.

    After the first window, at least half a window of context stands before the first scored id.
    """
    scored = 1
    while scored < len(ids):
        begin = 0 if scored == 1 else scored - context // 2
        end = min(len(ids), begin + context)
        yield Window(ids[begin:end], scored - begin)
        scored = end
