"""Base ids to new ids: removal by a table, then leftmost-longest matching of n-grams. Merger.

Upstream's rule takes, at each position, the first n-gram in priority order that matches. All that match at one
position are prefixes of one another, so an n-gram with a proper prefix of higher priority never wins; among the
others every longer match outranks every shorter one. Hence: leave those out, and first in order = longest.
It knows ids only, neither texts nor files. (Finding candidate positions with numpy first was tried and was slower:
272 ns a token against 106 for this walk, beside about 1,200 of the base's own encoding.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.patching.invariants import dead_ngrams

# A node of the trie: the new id of the n-gram that ends here and is the prefix of no other, or (new id or -1 when
# none ends here, piece -> node). Plain ints for the most frequent case.
_Node = int | tuple[int, dict[int, "_Node"]]


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
        # Where kept tokens keep their ids (our own builder), a walk puts out final ids: one list less to look into.
        moved = any(old != new for old, new in new_id_of.items())
        self._final = [*(new_id_of.get(token, -1) for token in range(base_size)), *ngram_ids] if moved else None
        marks = range(base_size, base_size + len(ngrams)) if moved else ngram_ids
        self._removed = {token: tuple(parts) for token, parts in removed.items()}
        self._length_of = dict(zip(ngram_ids, map(len, ngrams), strict=True))
        dead = dead_ngrams(ngrams, self._removed)
        skipped = {*dead.removed_piece, *dead.prefix_dominated}
        self._first: list[dict[int, _Node] | None] = [None] * base_size
        for index, pieces in enumerate(ngrams):
            if index not in skipped:
                self._insert(pieces, marks[index])

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """New ids of a text's base ids, each in 0..base_size-1."""
        removed = self._removed
        walked = list(ids)
        if removed and not removed.keys().isdisjoint(walked):
            walked = [part for token in walked for part in removed.get(token, (token,))]
        first = self._first
        out: list[int] = []
        add = out.append
        # An iterator instead of an index: a third faster. Only n-grams of three and more need the position.
        rest: Any = iter(walked)  # typing does not know that a list iterator's position can be read and set
        token = next(rest, None)
        for following in rest:
            if token is None:  # the last token was taken into an n-gram
                token = following
                continue
            follows = first[token]
            if follows is not None:
                node = follows.get(following)
                if node is not None:
                    if isinstance(node, int):
                        add(node)
                        token = None
                        continue
                    found, end = _longest(node, walked, len(walked) - rest.__length_hint__())
                    if end:
                        add(found)
                        rest.__setstate__(end)
                        token = None
                        continue
            add(token)
            token = following
        if token is not None:
            add(token)
        final = self._final
        return out if final is None else [final[mark] for mark in out]

    def traced(self, ids: Sequence[int]) -> Merged:
        """As the call, with where each new id came from."""
        removed = self._removed
        rows = [removed.get(token, (token,)) for token in ids]
        pieces = [part for row in rows for part in row]
        origins = [index for index, row in enumerate(rows) for _ in row]
        found = self(pieces)
        ends = itertools.accumulate((self._length_of.get(token, 1) for token in found), initial=0)
        return Merged(found, list(ends)[:-1], pieces, origins)

    def _insert(self, pieces: Sequence[int], new_id: int) -> None:
        """Add one n-gram of at least two pieces to the trie."""
        children = self._first[pieces[0]]
        if children is None:
            children = self._first[pieces[0]] = {}
        for piece in pieces[1:-1]:
            node = children.get(piece, -1)
            if isinstance(node, int):
                node = children[piece] = (node, {})
            children = node[1]
        longer = children.get(pieces[-1])
        children[pieces[-1]] = (new_id, longer[1]) if isinstance(longer, tuple) else new_id


def _longest(node: _Node, ids: Sequence[int], stop: int) -> tuple[int, int]:
    """(new id, end) of the longest n-gram from a node that was reached at `stop`; end 0 = none ends."""
    found, end = -1, 0
    while True:
        if isinstance(node, int):
            return node, stop
        if node[0] >= 0:
            found, end = node[0], stop
        if stop >= len(ids):
            return found, end
        deeper = node[1].get(ids[stop])
        if deeper is None:
            return found, end
        node = deeper
        stop += 1
