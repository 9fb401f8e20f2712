"""Kind appended-merges: more merge rules behind those of the base's BPE, so that no text can cost more than before.

BPE applies rules by rank. Rules that come after all of the base's act on the finished base segmentation, and each
only joins two tokens. What they would give is therefore found by going on with BPE training on the corpus' base ids.
A new token's spelling must be new: a rule that yields a base token could set earlier rules off again. It writes an
ordinary tokenizer.json and knows nothing of artefacts.
"""

from __future__ import annotations

import copy
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.patching.count import Joins

_SHIFT = np.int64(32)
LEAST_SAVING = 2


@dataclass(frozen=True, slots=True)
class NewMerge:
    """A rule: the ids it joins (new ones count on from the base's size) and the tokens it saved in the corpus."""

    left: int
    right: int
    saving: int


class Words:
    """Distinct words as rows of ids, with how often each occurs; words of one token cannot be joined and are left
    out. A word is what the base's pre-tokenizer makes: no rule acts across its ends."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}

    def add(self, ids: Any, ends: Any) -> None:
        """ids: (n,) uint32 of any number of documents; ends: (n,) bool, True at the last id of each word."""
        lasts = np.flatnonzero(ends)
        firsts = np.concatenate(([0], lasts[:-1] + 1)) if len(lasts) else lasts
        lengths = lasts - firsts + 1
        for length in np.unique(lengths[lengths > 1]).tolist():
            rows = ids[firsts[lengths == length][:, None] + np.arange(length)]
            packed = np.ascontiguousarray(rows, ">u4").view(f"V{4 * length}").ravel()
            distinct, counts = np.unique(packed, return_counts=True) if len(rows) > 1 else (packed, np.ones(1, int))
            for word, count in zip(distinct, counts.tolist()):
                key = word.tobytes()
                self._counts[key] = self._counts.get(key, 0) + count

    def rows(self) -> Iterator[tuple[Any, int]]:
        """(ids, occurrences) of each word, in the order of their ids."""
        for key in sorted(self._counts):
            yield np.frombuffer(key, ">u4").astype(np.int64), self._counts[key]


def collect_words(batches: Iterable[Sequence[str]], backend: Any, progress: Callable[[int], object] | None = None
                  ) -> Words:
    """The words of texts. backend: a tokenizers.Tokenizer without truncation."""
    words = Words()
    for batch in batches:
        ids, ends = [], []
        for encoding in backend.encode_batch(list(batch), add_special_tokens=False):
            row = np.array(encoding.ids, np.uint32)
            number = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
            last: Any = np.ones(len(row), bool)
            last[:-1] = number[1:] != number[:-1]
            ids.append(row)
            ends.append(last)
        if ids:
            words.add(np.concatenate(ids), np.concatenate(ends))
        if progress is not None:
            progress(sum(map(len, batch)))
    return words


def learn_merges(words: Words, joins: Joins, strings: Sequence[str | None], count: int, max_n: int,
                 bar: Callable[[int], object] | None = None) -> list[NewMerge]:
    """Up to `count` rules, each the pair that then saves most; equal savings: the smaller pair of ids.

    joins: which base ids may take part and which may only come first. strings: the spelling of each base id. max_n:
    base tokens that a new token may stand for.
    """
    work = _Training(words, joins, strings, max_n)
    found: list[NewMerge] = []
    while len(found) < count and (best := work.best()) is not None:
        found.append(best)
        if bar is not None:
            bar(1)
    return found


class _Training:
    """The corpus' words as one linked row of ids, and where each pair stands."""

    def __init__(self, words: Words, joins: Joins, strings: Sequence[str | None], max_n: int) -> None:
        rows = list(words.rows())
        lengths = np.array([len(row) for row, _ in rows], np.int64)
        self._ids = np.concatenate([np.zeros(0, np.int64), *(row for row, _ in rows)])
        self._weight: Any = np.repeat(np.array([count for _, count in rows], np.int64), lengths)
        size = len(self._ids)
        self._next = np.arange(1, size + 1)
        self._before = np.arange(-1, size - 1)
        ends = np.cumsum(lengths)
        self._next[ends - 1] = -1
        self._before[ends - lengths] = -1
        self._strings = list(strings)
        self._spelled = {text for text in strings if text is not None}
        self._length = [1] * len(strings)
        self._max_n = max_n
        self._usable = joins.usable.tolist()
        self._opens = joins.opens.tolist() if joins.opens is not None else [False] * len(strings)
        self._places: dict[tuple[int, int], Any] = {}
        self._heap: list[tuple[int, int, int]] = []
        self._index(np.flatnonzero(self._next >= 0))

    def best(self) -> NewMerge | None:
        """Make the best rule there is, everywhere."""
        while self._heap:
            bound, left, right = self._heap[0]
            places = self._live(left, right)
            saving = int(self._weight[places].sum())
            spelling = f"{self._strings[left]}{self._strings[right]}"
            if saving < LEAST_SAVING or spelling in self._spelled:
                heapq.heappop(self._heap)
                del self._places[left, right]
            elif saving != -bound:
                self._places[left, right] = places
                heapq.heapreplace(self._heap, (-saving, left, right))
            else:
                heapq.heappop(self._heap)
                del self._places[left, right]
                self._join(left, right, places, spelling)
                return NewMerge(left, right, saving)
        return None

    def _live(self, left: int, right: int) -> Any:
        """Where the pair still stands; of overlapping places those that a scan from the left takes."""
        places = self._places[left, right]
        places = places[(self._ids[places] == left) & (self._next[places] >= 0)]
        places = places[self._ids[self._next[places]] == right]
        if left != right or not len(places):
            return places
        taken, free = [], -1
        for place, following in zip(places.tolist(), self._next[places].tolist()):
            if place != free:
                taken.append(place)
                free = following
            else:
                free = -1
        return np.array(taken, np.int64)

    def _join(self, left: int, right: int, places: Any, spelling: str) -> None:
        new = len(self._strings)
        self._strings.append(spelling)
        self._spelled.add(spelling)
        self._length.append(self._length[left] + self._length[right])
        self._usable.append(True)
        self._opens.append(self._opens[left])
        seconds = self._next[places]
        after = self._next[seconds]
        self._ids[places] = new
        self._ids[seconds] = -1
        self._next[places] = after
        inner = after >= 0
        self._before[after[inner]] = places[inner]
        before = self._before[places]
        self._index(np.unique(np.concatenate([before[before >= 0], places[inner]])))

    def _index(self, places: Any) -> None:
        """Enter the pairs that begin at these places, ascending; none of them is known yet."""
        keys = (self._ids[places] << _SHIFT) | self._ids[self._next[places]]
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        if not len(keys):
            return
        firsts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        totals = np.add.reduceat(self._weight[places], firsts)
        lasts: Any = np.append(firsts[1:], len(keys))
        often = totals >= LEAST_SAVING
        for first, last, total in zip(firsts[often].tolist(), lasts[often].tolist(), totals[often].tolist()):
            left, right = divmod(int(keys[first]), 1 << 32)
            if (self._usable[left] and self._usable[right] and not self._opens[right]
                    and self._length[left] + self._length[right] <= self._max_n):
                self._places[left, right] = places[first:last]
                heapq.heappush(self._heap, (-total, left, right))


def extend_definition(definition: Mapping[str, Any], strings: Sequence[str | None], merges: Sequence[NewMerge]) -> str:
    """The text of a tokenizer.json with the new rules behind the base's; new ids follow the base's highest.

    strings: (V,) spelling of every base id, added tokens included: those outside the model's own vocabulary are put
    into it, because the library would else number them after the model's (then larger) vocabulary.
    """
    value = copy.deepcopy(dict(definition))
    model = value["model"]
    known = list(strings)
    rules = model["merges"]
    as_text = bool(rules) and isinstance(rules[0], str)
    for token in value.get("added_tokens") or ():
        model["vocab"].setdefault(token["content"], token["id"])
    for merge in merges:
        left, right = str(known[merge.left]), str(known[merge.right])
        model["vocab"][left + right] = len(known)
        rules.append(f"{left} {right}" if as_text else [left, right])
        known.append(left + right)
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
