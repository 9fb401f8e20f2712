"""Base ids to new ids: removal by a table, then leftmost-longest matching of n-grams. Merger.

Upstream's rule takes, at each position, the first n-gram in priority order that matches. All that match at one
position are prefixes of one another, so an n-gram with a proper prefix of higher priority never wins; among the
others every longer match outranks every shorter one. Hence: leave those out, and first in order = longest.
It knows ids only, neither texts nor files.

Long texts go through arrays: one hash table lookup finds the positions whose pair of ids may begin an n-gram, and
only those are walked. Short texts are walked whole, which costs less than the arrays' set-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.patching.invariants import dead_ngrams

SHORT_TOKENS = 48
_FILTER_BITS = 18
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads consecutive keys
_SHIFT = np.uint64(64 - _FILTER_BITS)

# A node of the trie: new id of the n-gram that ends here (-1 = none), then piece -> node (None = no longer ones).
_Node = list[Any]


@dataclass(frozen=True, slots=True)
class Merged:
    """ids: new ids. starts: for each, the index of its first piece; pieces: base ids after removal; origins: for
    each piece, the index of the base id it came from."""

    ids: list[int]
    starts: list[int]
    pieces: list[int]
    origins: list[int]


class Merger:
    """The second stage of one vocabulary. Immutable; shared by threads.

    base_size: one more than the highest base id; removed: base id -> base ids; ngrams: pieces in priority order;
    ngram_ids: their new ids; new_id_of: kept base id -> new id.
    """

    def __init__(self, base_size: int, removed: Mapping[int, Sequence[int]], ngrams: Sequence[Sequence[int]],
                 ngram_ids: Sequence[int], new_id_of: Mapping[int, int]) -> None:
        self._size = base_size
        self._new = np.full(base_size, -1, np.int64)
        self._new[list(new_id_of)] = list(new_id_of.values())
        self._new_list: list[int] = self._new.tolist()
        self._removed = {token: list(parts) for token, parts in removed.items()}
        rows = [self._removed.get(token, [token]) for token in range(base_size)]
        self._counts = np.array([len(row) for row in rows], np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._parts = np.array([part for row in rows for part in row], np.int64)
        self._is_removed = self._counts != 1
        dead = dead_ngrams(ngrams, self._removed)
        skipped = {*dead.removed_piece, *dead.prefix_dominated}
        self._pairs: dict[int, _Node] = {}
        self._longest = max((len(pieces) for pieces in ngrams), default=0)
        for index, pieces in enumerate(ngrams):
            if index not in skipped:
                self._insert(pieces, ngram_ids[index])
        self._filter = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._filter[self._hash(np.fromiter(self._pairs, np.uint64, len(self._pairs)))] = True

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """New ids of a text's base ids, each in 0..base_size-1."""
        if len(ids) <= SHORT_TOKENS:
            return self._short(ids)
        array = np.array(ids, np.int64)
        if self._is_removed[array].any():
            array = self._expand(array)[0]
        new, keep = self._merge(array)
        return new[keep].tolist() if keep is not None else new.tolist()

    def traced(self, ids: Sequence[int]) -> Merged:
        """As the call, with where each new id came from."""
        array, origins = self._expand(np.array(ids, np.int64))
        new, keep = self._merge(array)
        starts = np.arange(len(array)) if keep is None else np.flatnonzero(keep)
        return Merged(new[starts].tolist(), starts.tolist(), array.tolist(), origins.tolist())

    def _insert(self, pieces: Sequence[int], new_id: int) -> None:
        """Add one n-gram of at least two pieces to the trie, whose first level is keyed by pairs."""
        node = self._pairs.setdefault(pieces[0] * self._size + pieces[1], [-1, None])
        for piece in pieces[2:]:
            if node[1] is None:
                node[1] = {}
            node = node[1].setdefault(piece, [-1, None])
        node[0] = new_id

    def _short(self, ids: Sequence[int]) -> list[int]:
        """Walk every position."""
        removed = self._removed
        if not removed.keys().isdisjoint(ids):
            ids = [part for token in ids for part in removed.get(token, (token,))]
        pairs, size, new, last = self._pairs, self._size, self._new_list, len(ids) - 1
        out: list[int] = []
        at = 0
        while at < last:
            node = pairs.get(ids[at] * size + ids[at + 1])
            if node is not None:
                found, end = _longest(node, ids, at)
                if end:
                    out.append(found)
                    at = end
                    continue
            out.append(new[ids[at]])
            at += 1
        if at == last:
            out.append(new[ids[at]])
        return out

    def _expand(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Removed tokens replaced by their parts; and for each part, the index it came from."""
        counts = self._counts[array]
        origins = np.repeat(np.arange(len(array)), counts)
        within = np.arange(len(origins)) - (np.cumsum(counts) - counts)[origins]
        return self._parts[self._offsets[array][origins] + within], origins

    def _merge(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(new id of each position, which positions begin a token; None = all)."""
        new = self._new[array]
        if len(array) < 2:
            return new, None
        keys = array[:-1].astype(np.uint64)
        keys *= np.uint64(self._size)
        keys += array[1:].astype(np.uint64)
        candidates = np.flatnonzero(self._filter[self._hash(keys)])
        if not candidates.size:
            return new, None
        ids = array.tolist()
        get, reached = self._pairs.get, 0
        starts: list[int] = []
        ends: list[int] = []
        found_ids: list[int] = []
        for at, key in zip(candidates.tolist(), keys[candidates].tolist(), strict=True):
            if at < reached:
                continue
            node = get(key)
            if node is None:  # the filter lets a few others through
                continue
            if node[1] is None:  # most n-grams are pairs that begin no longer one
                found, reached_now = node[0], at + 2
            else:
                found, reached_now = _longest(node, ids, at)
                if not reached_now:
                    continue
            reached = reached_now
            starts.append(at)
            ends.append(reached)
            found_ids.append(found)
        return self._apply(new, starts, ends, found_ids)

    def _apply(self, new: np.ndarray, starts: list[int], ends: list[int], found_ids: list[int]
               ) -> tuple[np.ndarray, np.ndarray | None]:
        """Write the matches into the new ids; mark the positions that they cover but do not begin."""
        if not starts:
            return new, None
        first, end = np.array(starts), np.array(ends)
        new[first] = found_ids
        keep = np.ones(len(new), np.bool_)
        keep[first + 1] = False
        for step in range(2, self._longest):
            longer = end > first + step
            first, end = first[longer], end[longer]
            keep[first + step] = False
        return new, keep

    def _hash(self, keys: np.ndarray) -> np.ndarray:
        """Index into the filter, of uint64 keys."""
        return ((keys * _MULTIPLIER) >> _SHIFT).astype(np.int64)


def _longest(node: _Node, ids: Sequence[int], at: int) -> tuple[int, int]:
    """(new id, end) of the longest n-gram at `at`, given the node of its first pair; end 0 = none ends."""
    found, children = node
    stop = at + 2
    end = stop if found >= 0 else 0
    while children is not None and stop < len(ids):
        deeper = children.get(ids[stop])
        if deeper is None:
            break
        stop += 1
        if deeper[0] >= 0:
            found, end = deeper[0], stop
        children = deeper[1]
    return found, end
