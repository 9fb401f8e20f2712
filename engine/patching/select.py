"""Which n-grams to add: greedy by what each still saves, exactly recounted after every choice.

The corpus is a row of units, at first one per id. Choosing an n-gram joins, wherever its ids still stand on whole
units, those units into one; an occurrence with k units saves k - 1. What an n-gram saves can only fall, so that a
priority queue with recounts on demand finds the true best each time. An n-gram's occurrences are taken without
overlaps of its own, from the left. It does not know how the corpus is read or what a model is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.patching.corpus import TokenStream
from engine.patching.count import Joins, Level, Progress, count_ngrams, flags, positions_of

LEAST_SAVING = 2
POOL_FACTOR = 6
POOL_GROWTH = 3
Ngram = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """An n-gram and the tokens that it saved in the corpus at the moment it was chosen."""

    ngram: Ngram
    saving: int


@dataclass(frozen=True, slots=True)
class _Pool:
    """Candidates by falling upper bound; what is not in it can save `rest` at most."""

    which: list[tuple[int, int]]  # (level number, n-gram number)
    ngrams: list[Ngram]
    bounds: list[int]
    rest: int


def select_ngrams(stream: TokenStream, joins: Joins, count: int, max_n: int, folder: Path,
                  accept: Callable[[Ngram], bool] = lambda ngram: True, progress: Progress | None = None,
                  chosen_bar: Progress | None = None, min_count: int | None = None) -> list[Choice]:
    """Up to `count` n-grams in the order chosen; fewer where no other would save LEAST_SAVING tokens.

    accept: says no to n-grams that are not wanted whatever they save. Equal savings: the smaller tuple of ids first.
    min_count: where counting starts to look (default: by the corpus' size); it is lowered until it can be shown that
    nothing rarer would have been chosen, so the result does not depend on it.
    """
    if count <= 0:
        return []
    floor = min_count or max(LEAST_SAVING, len(stream.ids) // 2_000_000)
    while True:
        levels = count_ngrams(stream, joins, max_n, floor, folder, progress)
        unseen = (floor - 1) * (max_n - 1) if floor > LEAST_SAVING else LEAST_SAVING - 1
        size = POOL_FACTOR * count
        while True:
            pool = _pool(levels, size, accept, unseen)
            choices = _greedy(stream, levels, pool, count, folder, chosen_bar)
            complete = len(choices) == count and choices[-1].saving > pool.rest
            if complete or pool.rest <= unseen:
                break
            size *= POOL_GROWTH
        if complete or floor <= LEAST_SAVING:
            return choices
        floor = max(LEAST_SAVING, floor // 4)


def _pool(levels: list[Level], size: int, accept: Callable[[Ngram], bool], unseen: int) -> _Pool:
    """The `size` accepted candidates with the highest bounds, and all that equal the last of them."""
    bounds = np.concatenate([level.counts * (level.tokens.shape[1] - 1) for level in levels])
    owner: Any = np.repeat(np.arange(len(levels)), [len(level.counts) for level in levels])
    number = np.concatenate([np.arange(len(level.counts)) for level in levels])
    which: list[tuple[int, int]] = []
    ngrams: list[Ngram] = []
    kept: list[int] = []
    for entry in np.argsort(-bounds, kind="stable"):
        bound = int(bounds[entry])
        if bound < LEAST_SAVING or (len(kept) >= size and bound < kept[-1]):
            return _Pool(which, ngrams, kept, max(unseen, bound))
        level, item = int(owner[entry]), int(number[entry])
        ngram = tuple(map(int, levels[level].tokens[item]))
        if accept(ngram):
            which.append((level, item))
            ngrams.append(ngram)
            kept.append(bound)
    return _Pool(which, ngrams, kept, unseen)


def _greedy(stream: TokenStream, levels: list[Level], pool: _Pool, count: int, folder: Path,
            bar: Progress | None) -> list[Choice]:
    """Choose from the pool."""
    begins = flags(folder / "unit-begins", len(stream.ids) + max(level.tokens.shape[1] for level in levels))
    begins[:] = True
    spots = [_Spots(level, [item for owner, item in pool.which if owner == number], folder / f"spots-{number}")
             for number, level in enumerate(levels)]
    rank = {ngram: place for place, ngram in enumerate(sorted(pool.ngrams))}
    heap = [(-bound, rank[ngram], place) for place, (bound, ngram) in enumerate(zip(pool.bounds, pool.ngrams))]
    heapq.heapify(heap)
    choices: list[Choice] = []
    while heap and len(choices) < count:
        bound, order, place = heap[0]
        owner, item = pool.which[place]
        spot = spots[owner]
        saving = spot.saving(item, begins)
        if saving < LEAST_SAVING:
            heapq.heappop(heap)
        elif -bound != saving:
            heapq.heapreplace(heap, (-saving, order, place))
        else:
            heapq.heappop(heap)
            spot.join(item, begins)
            choices.append(Choice(pool.ngrams[place], saving))
            if bar is not None:
                bar(1)
    return choices


class _Spots:
    """Where the candidates of one length can still be joined; it forgets occurrences that are lost for good."""

    def __init__(self, level: Level, items: list[int], path: Path) -> None:
        self._n = int(level.tokens.shape[1])
        wanted = np.array(items, np.int64)
        self._places, offsets = positions_of(level, wanted, path)
        self._first = dict(zip(items, offsets[:-1].tolist()))
        self._length = dict(zip(items, np.diff(offsets).tolist()))
        for item in items:
            if period := _period(tuple(map(int, level.tokens[item]))):
                kept = _apart(self._of(item), self._n, period)
                self._keep(item, kept)

    def _of(self, item: int) -> Any:
        first = self._first[item]
        return self._places[first:first + self._length[item]]

    def _keep(self, item: int, places: Any) -> None:
        first = self._first[item]
        self._places[first:first + len(places)] = places
        self._length[item] = len(places)

    def saving(self, item: int, begins: Any) -> int:
        """Tokens that joining this n-gram now would save. begins: (N + n,) bool, positions where a unit begins."""
        places = self._of(item)
        live = begins[places] & begins[places + self._n]
        if not live.all():
            places = places[live]
            self._keep(item, places)
        return sum(int(np.count_nonzero(begins[places + step])) for step in range(1, self._n))

    def join(self, item: int, begins: Any) -> None:
        """Make each of its occurrences one unit. Only right after saving()."""
        places = self._of(item)
        for step in range(1, self._n):
            begins[places + step] = False


def _period(ngram: Ngram) -> int:
    """The least shift by which an n-gram overlaps itself; 0 = it cannot."""
    return next((shift for shift in range(1, len(ngram)) if ngram[shift:] == ngram[:-shift]), 0)


def _apart(places: Any, n: int, period: int) -> Any:
    """Of ascending positions those that a scan from the left takes without overlaps. O(P)."""
    if len(places) < 2 or int(np.diff(places).min()) >= n:
        return places
    assert period < n
    taken = []
    free = 0
    for place in places.tolist():
        if place >= free:
            taken.append(place)
            free = place + n
    return np.array(taken, np.int64)
