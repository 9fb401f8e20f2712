"""How much memory the running sequences will still ask for: the expected growth G that an admission leaves free.

It counts tokens and page groups and decides nothing: the draft compares its answer with what the ledger has free. A
forecast that is wrong costs waiting or preemptions, never memory or tokens. Source: section 6.4 of our notes on
AdaptiVocab (arXiv 2503.19693). Differs: what a sequence already holds is taken off; errors that all requests share (of
rho, of the history's mean) enter once, as the square of their sum; a term for skewness, without which a risk of 0.001
was 0.007 for 25 requests; half a group of rounding for each that grows in place of a whole one for each that runs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

from engine.core.demand import RhoEstimator
from engine.core.errors import InvariantError
from engine.core.sequence import Sequence

HISTORY = 1024  # finished requests that are remembered
REBUILD = 64  # of them after which the tables are made anew
MIN_LONGER = 8  # outputs longer than the one asked about; below, nothing is known of it
FEEDBACK = 256  # finished requests after which preemptions are looked at
MAX_PREEMPTED = 0.01  # of them; above, z is raised
Z_STEP, MAX_Z_STEPS = 0.5, 6


class Expected(NamedTuple):
    """What one sequence will need beyond the memory it has; sums of it are what several will.

    tokens: mean; variance and third: its central moments. chance: that it needs any. doubt: standard error of `tokens`
    as the history has it. imported: the part of `tokens` that was predicted from lengths in base tokens, so depends on
    rho.
    """

    tokens: float = 0.0
    variance: float = 0.0
    third: float = 0.0
    chance: float = 0.0
    doubt: float = 0.0
    imported: float = 0.0

    def plus(self, other: Expected, times: int = 1) -> Expected:
        """Both together; times=-1 takes the other away."""
        return Expected(*(mine + times * its for mine, its in zip(self, other, strict=True)))


NOTHING = Expected()


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
        self._sums: tuple[list[float], ...] = ()  # of mass * length^k, k = 0..3, over the lengths from each index on
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
            return NOTHING
        lengths = self._lengths
        alive = bisect_right(lengths, done)
        longer = len(lengths) - 1 - alive
        if longer < MIN_LONGER:
            return Expected(cap - held, chance=1.0)
        first, last = bisect_right(lengths, held), bisect_right(lengths, cap)
        s0, s1, s2, s3 = (sums[first] - sums[last] for sums in self._sums)
        mass, most = self._sums[0], cap - held
        all_, cut = mass[alive], mass[last]
        tokens = (s1 - held * s0 + cut * most) / all_
        squares = (s2 - 2 * held * s1 + held**2 * s0 + cut * most**2) / all_
        cubes = (s3 - 3 * held * s2 + 3 * held**2 * s1 - held**3 * s0 + cut * most**3) / all_
        variance = max(0.0, squares - tokens**2)
        third = max(0.0, cubes - 3 * tokens * squares + 2 * tokens**3)
        return Expected(tokens, variance, third, mass[first] / all_, math.sqrt(variance / longer),
                        tokens * self._imported)

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
        powers = [[m * n**k for m, n in zip(mass, lengths, strict=True)] for k in range(4)]
        rest = (max(0.0, left), 0.0, 0.0, 0.0)  # of infinite length: only its mass is ever asked for
        self._sums = tuple(list(accumulate((0.0, end, *reversed(row))))[::-1]
                           for row, end in zip(powers, rest, strict=True))
        self._new = 0


class GrowthForecast:
    """The sum of what running sequences will still need, at a risk; O(log HISTORY) for each start, growth and end.

    risk: probability that they need more than said. group_tokens: tokens of a page group, maybe a fraction. rho: of the
    outputs.
    """

    def __init__(self, risk: float, group_tokens: float, rho: RhoEstimator,
                 base_lengths: Iterable[int] = ()) -> None:
        self.history = OutputHistory(rho, base_lengths)
        self.cautious = 0  # steps of Z_STEP above the z of the risk
        self._risk_z = NormalDist().inv_cdf(1 - risk)
        self._group_tokens = group_tokens
        self._rho = rho
        self._phi = self._se = 0.0  # of rho, relative to it; refreshed now and then, because they move slowly
        self._running: dict[int, Expected] = {}
        self._sum = NOTHING
        self._finished = self._lost = 0
        self._refresh()

    def expect(self, sequence: Sequence) -> Expected:
        """What a sequence will need beyond the memory it has (a waiting one: beyond its known tokens)."""
        if sequence.whole:
            return NOTHING
        prompt = len(sequence.request.prompt)
        known = sequence.known
        found = self.history.beyond(known - prompt, max(known, sequence.covered) - prompt, sequence.length_cap - prompt)
        if not found.imported:
            return found
        return found._replace(variance=found.variance + self._phi * found.imported)

    def groups(self, more: Expected | None = None) -> int:
        """Page groups that everything running, and `more`, will still ask for, at the risk."""
        all_ = self._sum if more is None else self._sum.plus(more)
        square = max(0.0, all_.variance) + all_.doubt**2 + (all_.imported * self._se) ** 2
        z = self._risk_z + Z_STEP * self.cautious
        bound = all_.tokens + z * math.sqrt(square)
        if square > 0:  # few requests: their sum is skewed, like each of them (Cornish and Fisher's first term)
            bound += (z * z - 1) / 6 * max(0.0, all_.third) / square
        # The last group of each is on average half empty; a sequence that grows fills the one it has first.
        return math.ceil(max(0.0, bound) / self._group_tokens) + math.ceil(all_.chance / 2)

    def watch(self, sequence: Sequence) -> None:
        """A sequence has started, or holds more memory than before."""
        self._subtract(sequence.seq_id)
        found = self._running[sequence.seq_id] = self.expect(sequence)
        self._sum = self._sum.plus(found)

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

    def check(self, running: Iterable[int]) -> None:
        """Raise InvariantError unless exactly these sequences are counted, and the sum is theirs."""
        if sorted(running) != sorted(self._running):
            raise InvariantError(f"growth is expected of {sorted(self._running)}, running are {sorted(running)}")
        tokens = math.fsum(found.tokens for found in self._running.values())
        if abs(tokens - self._sum.tokens) > 1e-6 * (1 + tokens):
            raise InvariantError(f"{self._sum.tokens} tokens of growth are expected, the sequences' sum is {tokens}")

    def stats(self) -> dict[str, int]:
        """Gauges, in page groups and tokens."""
        return {"expected_growth_groups": self.groups(), "growth_caution": self.cautious}

    def _subtract(self, seq_id: int) -> None:
        found = self._running.pop(seq_id, None)
        if found is not None:  # when nothing is left, neither is what rounding left behind
            self._sum = self._sum.plus(found, -1) if self._running else NOTHING

    def _refresh(self) -> None:
        value = self._rho.value
        self._phi, self._se = self._rho.phi / value, self._rho.se / value
