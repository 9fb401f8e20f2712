"""How often every n-gram of base ids occurs, exactly, for corpora larger than memory.

An n-gram is coded as (number of its first n-1 ids among the kept (n-1)-grams, last id): 64 bits for any n and any
vocabulary. Chunks are counted by sorting, the sorted runs merged range by range. Pruning is exact: an n-gram cannot
occur more often than a part of it. It does not know which n-grams are worth anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.patching.corpus import TokenStream

CHUNK_TOKENS = 4 << 20
MERGE_ENTRIES = 16 << 20
NONE = np.uint32(0xFFFFFFFF)
_SHIFT = np.uint64(32)
Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Joins:
    """What may stand in an n-gram. usable: (V,) bool, ids that may. opens: (V,) bool, ids that begin a word and so may
    only be the first of an n-gram; None = n-grams may span words."""

    usable: Any
    opens: Any | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """All n-grams of one length that occur at least min_count times, in the order of their ids.

    tokens: (K, n) uint32; counts: (K,) int64, overlapping occurrences included; at: (N,) uint32 on disk, the number
    of the n-gram that begins at each position of the stream, NONE where there is none of those kept.
    """

    tokens: Any
    counts: Any
    at: Any


def count_ngrams(stream: TokenStream, joins: Joins, max_n: int, min_count: int, folder: Path,
                 progress: Progress | None = None, chunk_tokens: int = CHUNK_TOKENS) -> list[Level]:
    """Levels n = 2..max_n. folder: for the temporary files, 4 bytes a token and level. progress: told the positions
    passed, 2 * (max_n - 1) * N in all. Nothing crosses a document's end. The result does not depend on chunk_tokens.
    """
    size = len(stream.ids)
    begins = flags(folder / "document-begins", size + 1)
    begins[stream.starts] = True
    levels: list[Level] = []
    for n in range(2, max_n + 1):
        source = _Keys(stream.ids, begins, joins, levels[-1] if levels else None, n)
        kept, counts = _count(source, size, min_count, folder, progress, chunk_tokens)
        path = folder / f"at-{n}"
        path.unlink(missing_ok=True)
        with path.open("wb") as out:
            for _, keys, valid in source.chunks(chunk_tokens):
                _number(keys, valid, kept).tofile(out)
                if progress is not None:
                    progress(len(keys))
        at = np.asarray(np.memmap(path, np.uint32, "r")) if size else np.zeros(0, np.uint32)
        levels.append(Level(_spell(kept, levels[-1] if levels else None), counts, at))
    return levels


def flags(path: Path, size: int) -> Any:
    """(size,) bool, False, over a new file, so that a long row need not fit into memory. size >= 1."""
    path.unlink(missing_ok=True)  # an older row of the same name may still be mapped
    return np.asarray(np.memmap(path, np.bool_, "w+", shape=(size,)))


class _Keys:
    """The 64-bit codes of all n-grams of one length, chunk by chunk."""

    def __init__(self, ids: Any, begins: Any, joins: Joins, below: Level | None, n: int) -> None:
        self._ids, self._begins, self._joins, self._below, self._n = ids, begins, joins, below, n

    def chunks(self, chunk_tokens: int) -> Iterator[tuple[int, Any, Any]]:
        """(first position, keys (M,) uint64, valid (M,) bool) over all positions, in order."""
        for first in range(0, len(self._ids), chunk_tokens):
            last = min(first + chunk_tokens, len(self._ids))
            yield first, *(self._pairs(first, last) if self._below is None else self._longer(first, last))

    def _pairs(self, first: int, last: int) -> tuple[Any, Any]:
        ids = np.asarray(self._ids[first:last + 1])
        valid: Any = np.zeros(last - first, bool)
        usable = self._joins.usable[ids]
        inner = len(ids) - 1
        valid[:inner] = usable[:-1] & usable[1:] & ~self._begins[first + 1:first + 1 + inner]
        if self._joins.opens is not None:
            valid[:inner] &= ~self._joins.opens[ids[1:]]
        keys: Any = np.zeros(last - first, np.uint64)
        keys[:inner] = (ids[:-1].astype(np.uint64) << _SHIFT) | ids[1:]
        return keys, valid

    def _longer(self, first: int, last: int) -> tuple[Any, Any]:
        assert self._below is not None
        numbers = np.asarray(self._below.at[first:last + 1])
        ends = np.asarray(self._ids[first + self._n - 1:last + self._n - 1])
        keys: Any = np.zeros(last - first, np.uint64)
        valid: Any = np.zeros(last - first, bool)
        inner = min(len(ends), len(numbers) - 1)
        valid[:inner] = (numbers[:inner] != NONE) & (numbers[1:inner + 1] != NONE)
        keys[:inner] = (numbers[:inner].astype(np.uint64) << _SHIFT) | ends[:inner]
        return keys, valid


def _count(source: _Keys, size: int, min_count: int, folder: Path, progress: Progress | None, chunk_tokens: int
           ) -> tuple[Any, Any]:
    """(kept keys sorted (K,) uint64, counts (K,) int64). Runs beyond the first go through files."""
    runs: list[tuple[Any, Any]] = []
    spill = size > chunk_tokens
    for first, keys, valid in source.chunks(chunk_tokens):
        run = _tally(np.sort(keys[valid]))
        runs.append(_spill(folder / f"run-{first}", run) if spill and len(run[0]) else run)
        if progress is not None:
            progress(len(keys))
    kept = list(merge(runs, min_count))
    for path in folder.glob("run-*"):
        path.unlink()
    return np.concatenate([keys for keys, _ in kept]), np.concatenate([counts for _, counts in kept])


def _tally(ordered: Any) -> tuple[Any, Any]:
    """Distinct values of a sorted row and how often each occurs."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64)
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    return ordered[first], np.diff(np.append(first, len(ordered)))


def _spill(path: Path, run: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same run, read from files."""
    mapped = []
    for part, suffix in zip(run, ("k", "c")):
        file = path.with_name(f"{path.name}-{suffix}")
        part.tofile(file)
        mapped.append(np.memmap(file, part.dtype, "r"))
    return mapped[0], mapped[1]


def merge(runs: list[tuple[Any, Any]], min_count: int, budget_entries: int = MERGE_ENTRIES
          ) -> Iterator[tuple[Any, Any]]:
    """Add sorted runs of (keys, counts) up, key range by key range, and keep what reaches min_count."""
    total = sum(len(keys) for keys, _ in runs)
    pieces = -(-total // budget_entries)
    cuts: list[Any] = []
    if pieces > 1:
        step = max(1, total // (pieces * 64))
        sample = np.sort(np.concatenate([np.asarray(keys[::step]) for keys, _ in runs]))
        cuts = list(np.unique(sample[np.arange(1, pieces) * len(sample) // pieces]))
    places = [[0, *(int(np.searchsorted(keys, cut)) for cut in cuts), len(keys)] for keys, _ in runs]
    for piece in range(len(cuts) + 1):
        spans = [slice(place[piece], place[piece + 1]) for place in places]
        keys = np.concatenate([np.zeros(0, np.uint64), *(run[0][span] for run, span in zip(runs, spans))])
        counts = np.concatenate([np.zeros(0, np.int64), *(run[1][span] for run, span in zip(runs, spans))])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        if len(keys):
            first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
            keys, counts = keys[first], np.add.reduceat(counts, first)
        often = counts >= min_count
        yield keys[often], counts[often]


def _number(keys: Any, valid: Any, kept: Any) -> Any:
    """(M,) uint32: the number of each key among the kept ones, NONE where it is not."""
    numbers: Any = np.full(len(keys), NONE, np.uint32)
    if not len(kept):
        return numbers
    where = np.flatnonzero(valid)
    asked = keys[where]
    found = np.minimum(np.searchsorted(kept, asked), len(kept) - 1)
    hit = kept[found] == asked
    numbers[where[hit]] = found[hit].astype(np.uint32)
    return numbers


def _spell(kept: Any, below: Level | None) -> Any:
    """(K, n) uint32: the ids of each kept key."""
    head = (kept >> _SHIFT).astype(np.uint32)
    tail = (kept & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
    return np.hstack([head[:, None] if below is None else below.tokens[head], tail])


def positions_of(level: Level, wanted: Any, path: Path, progress: Progress | None = None,
                 chunk_tokens: int = CHUNK_TOKENS) -> tuple[Any, Any]:
    """Where chosen n-grams of a level begin. wanted: (M,) numbers of the level, distinct.

    Returns (positions (P,) int64 on disk, grouped by n-gram in the order of `wanted` and ascending in each group,
    offsets (M + 1,) int64 of the groups).
    """
    offsets = np.concatenate(([0], np.cumsum(level.counts[wanted]))).astype(np.int64)
    total = int(offsets[-1])
    path.unlink(missing_ok=True)
    places = np.asarray(np.memmap(path, np.int64, "w+", shape=(total,))) if total else np.zeros(0, np.int64)
    group: Any = np.full(len(level.counts) + 1, -1, np.int64)  # the last entry stands for NONE
    group[wanted] = np.arange(len(wanted))
    cursor = offsets[:-1].copy()
    for first in range(0, len(level.at), chunk_tokens):
        numbers = np.minimum(level.at[first:first + chunk_tokens], np.uint32(len(level.counts)))
        groups = group[numbers]
        here = np.flatnonzero(groups >= 0)
        order = here[np.argsort(groups[here], kind="stable")]
        ordered = groups[order]
        distinct, counts = _tally(ordered)
        within = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
        places[cursor[ordered] + within] = order + first
        cursor[distinct] += counts
        if progress is not None:
            progress(len(numbers))
    assert np.array_equal(cursor, offsets[1:])
    return places, offsets
