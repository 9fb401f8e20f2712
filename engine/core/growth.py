"""How much memory the running sequences will still ask for: the expected growth G that an admission leaves free.

It counts tokens and page groups and decides nothing: the draft compares its answer with what the ledger has free. A
forecast that is wrong costs waiting or preemptions, never memory or tokens. Source: section 6.4 of our notes on
AdaptiVocab (arXiv 2503.19693); differs: what a sequence already holds is taken off, group by group, and the error of
rho that all requests share enters once, as (sum E)^2 se^2.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

from engine.core.demand import RhoEstimator
from engine.core.sequence import Sequence

HISTORY = 1024  # finished requests that are remembered
REBUILD = 64  # of them after which the tables are made anew
MIN_LONGER = 8  # outputs longer than the one asked about; below, nothing is known of it
FEEDBACK = 256  # finished requests after which preemptions are looked at
MAX_PREEMPTED = 0.01  # of them; above, z is raised
Z_STEP, MAX_Z_STEPS = 0.5, 6


class Expected(NamedTuple):
    """What one sequence will need beyond the memory it has. tokens: mean; variance: of it; chance: that it needs any;
    imported: the part of `tokens` that was predicted from lengths in base tokens, so depends on rho."""

    tokens: float
    variance: float
    chance: float
    imported: float = 0.0


class OutputHistory:
    """Lengths of the outputs of the last HISTORY requests, and what they say of one that is `done` tokens long.

    base_lengths: lengths in base tokens, as an earlier deployment or a trace had them; they are turned into engine
    tokens by `rho` and give way to what finishes here, which is counted in engine tokens and needs no rho.
    An output that was cut (max_tokens, abort) only says "at least so long": Kaplan-Meier, its mass beyond the longest
    seen one counts as "up to the cap".
    """

    def __init__(self, rho: RhoEstimator, base_lengths: Iterable[int] = ()) -> None:
        self._rho = rho
        self._seen: deque[tuple[int, bool, bool]] = deque(((n, True, True) for n in base_lengths), HISTORY)
        self._new = REBUILD  # finished since the tables were made; this many: there are none
        self._lengths: list[float] = []  # ascending; a last entry of infinity holds the mass that was cut
        self._mass: list[float] = []  # of the lengths from each index on
        self._first: list[float] = []  # mass * length
        self._second: list[float] = []  # mass * length^2
        self._imported = 0.0

    def finished(self, tokens: int, ended: bool) -> None:
        """A request's output is over. ended: by itself, not cut."""
        self._seen.append((tokens, ended, False))
        self._new += 1

    def beyond(self, done: int, held: int, cap: int) -> Expected:
        """What an output of `done` tokens will need beyond the `held` it has memory for; it is cut at `cap`.

        0 <= done <= held [engine tokens]. Up to the cap when too few of the remembered outputs were longer.
        """
        if self._new >= REBUILD:
            self._rebuild()
        if held >= cap:
            return Expected(0.0, 0.0, 0.0)
        lengths, mass = self._lengths, self._mass
        alive = bisect_right(lengths, done)
        if len(lengths) - 1 - alive < MIN_LONGER:
            return Expected(cap - held, 0.0, 1.0)
        first, last = bisect_right(lengths, held), bisect_right(lengths, cap)
        all_, some, most = mass[alive], mass[first], cap - held
        inside = some - mass[last]
        sum_1, sum_2 = self._first[first] - self._first[last], self._second[first] - self._second[last]
        tokens = (sum_1 - held * inside + mass[last] * most) / all_
        squares = (sum_2 - 2 * held * sum_1 + held * held * inside + mass[last] * most * most) / all_
        variance = max(0.0, squares - tokens * tokens)
        return Expected(tokens, variance, some / all_, tokens * self._imported)

    def _rebuild(self) -> None:
        """The tables, O(HISTORY log HISTORY), once in REBUILD finished requests."""
        rho = self._rho.value
        rows = sorted((length * rho if base else length, not ended) for length, ended, base in self._seen)
        self._imported = sum(base for _, _, base in self._seen) / max(1, len(rows))
        left, mass = 1.0, []
        for at_risk, (_, cut) in zip(range(len(rows), 0, -1), rows, strict=True):
            mass.append(0.0 if cut else left / at_risk)
            left -= mass[-1]
        lengths = [length for length, _ in rows]
        self._lengths = [*lengths, math.inf]
        self._mass = _from_the_end([*mass, max(0.0, left)])
        self._first = _from_the_end([*(m * n for m, n in zip(mass, lengths, strict=True)), 0.0])
        self._second = _from_the_end([*(m * n * n for m, n in zip(mass, lengths, strict=True)), 0.0])
        self._new = 0


def _from_the_end(values: list[float]) -> list[float]:
    """Sums of the values from each index on, and 0 behind the last."""
    return [*reversed(list(accumulate(reversed(values)))), 0.0]


class GrowthForecast:
    """The sum of what running sequences will still need, at a risk; O(log HISTORY) for each start, growth and end.

    risk: probability that they need more than said. groups_for(tokens): the ledger's. rho: of the outputs.
    """

    def __init__(self, risk: float, groups_for: Callable[[int], int], rho: RhoEstimator,
                 base_lengths: Iterable[int] = ()) -> None:
        self.history = OutputHistory(rho, base_lengths)
        self.cautious = 0  # steps of Z_STEP above the z of the risk
        self._risk_z = NormalDist().inv_cdf(1 - risk)
        self._groups_for = groups_for
        self._rho = rho
        self._phi = self._se = 0.0  # of rho, relative to it; refreshed now and then, because they move slowly
        self._running: dict[int, Expected] = {}
        self._tokens = self._variance = self._chance = self._imported = 0.0
        self._finished = self._lost = 0
        self._refresh()

    def expect(self, sequence: Sequence) -> Expected:
        """What a sequence will need beyond the memory it has (a waiting one: beyond its known tokens)."""
        if sequence.whole:
            return Expected(0.0, 0.0, 0.0)
        prompt = len(sequence.request.prompt)
        known = sequence.known
        found = self.history.beyond(known - prompt, max(known, sequence.covered) - prompt, sequence.length_cap - prompt)
        if not found.imported:
            return found
        return found._replace(variance=found.variance + self._phi * found.imported)

    def groups(self, more: Expected | None = None) -> int:
        """Page groups that everything running, and `more`, will still ask for, at the risk."""
        tokens, variance, chance, imported = self._tokens, self._variance, self._chance, self._imported
        if more is not None:
            tokens, variance = tokens + more.tokens, variance + more.variance
            chance, imported = chance + more.chance, imported + more.imported
        sigma = math.sqrt(max(0.0, variance) + (imported * self._se) ** 2)
        bound = tokens + (self._risk_z + Z_STEP * self.cautious) * sigma
        # The last group of each is on average half empty; a sequence that grows fills the one it has first.
        return self._groups_for(math.ceil(max(0.0, bound))) + math.ceil(chance / 2)

    def watch(self, sequence: Sequence) -> None:
        """A sequence has started, or holds more memory than before."""
        self._subtract(sequence.seq_id)
        found = self._running[sequence.seq_id] = self.expect(sequence)
        self._tokens += found.tokens
        self._variance += found.variance
        self._chance += found.chance
        self._imported += found.imported

    def lost(self, seq_id: int) -> None:
        """A sequence was preempted."""
        self._subtract(seq_id)
        self._lost += 1

    def ended(self, sequence: Sequence, *, by_itself: bool) -> None:
        """A sequence is over (by_itself: not cut short by max_tokens, its client or a fault)."""
        self._subtract(sequence.seq_id)
        self.history.finished(len(sequence.outputs), by_itself)
        self._finished += 1
        if self._finished >= FEEDBACK:
            step = 1 if self._lost > MAX_PREEMPTED * self._finished else -1 if not self._lost else 0
            self.cautious = min(max(0, self.cautious + step), MAX_Z_STEPS)
            self._finished = self._lost = 0
            self._refresh()

    def stats(self) -> dict[str, int]:
        """Gauges, in page groups and tokens."""
        return {"expected_growth_groups": self.groups(), "growth_caution": self.cautious}

    def _subtract(self, seq_id: int) -> None:
        found = self._running.pop(seq_id, None)
        if found is None:
            return
        if not self._running:  # nothing left: what rounding left behind goes, too
            self._tokens = self._variance = self._chance = self._imported = 0.0
            return
        self._tokens -= found.tokens
        self._variance -= found.variance
        self._chance -= found.chance
        self._imported -= found.imported

    def _refresh(self) -> None:
        value = self._rho.value
        self._phi, self._se = self._rho.phi / value, self._rho.se / value
