"""Prompts in the order that brings most first tokens in time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from engine.core.errors import ConfigError
from engine.core.policies._order import PromptCost, Shortest
from engine.core.sequence import Sequence

PUT_OFF_SHARE = 0.01  # of the prompts that start, so many may be put off: the target is one for the other 99 %
PUT_OFF_MOST = 5.0  # at once, however many started before
PATIENCE = 8  # a prompt that was put off is due after so many targets
KEPT_SPEED = 0.8  # part of today's speed that is counted on: those who start will decode, and others come
CALLED_FORWARD = 4  # prompts at most, in one step, that pass others with an earlier deadline


class _Job(NamedTuple):
    """A prompt with what its place depends on. takes_s: what is left of it takes so long."""

    priority: int
    due_s: float
    takes_s: float
    sequence: Sequence


@dataclass(slots=True)
class Deadline:
    """First tokens within target_s for as many as can be: the shortest goes first while all others stay in time.

    When, in the order of deadlines, somebody would come late whom it saves, the largest prompt up to there is put off,
    which leaves the fewest late (Moore, An n Job, One Machine Sequencing Algorithm for Minimizing the Number of Late
    Jobs, Management Science 15, 1968); but no more than PUT_OFF_SHARE of all. Beyond that the oldest goes first. A
    prompt that was put off is due after PATIENCE targets, and so is one that takes more than KEPT_SPEED of the target
    by itself: it would make others late, whenever it came. A request that was started anew had its first token and
    goes before all of its priority. Raises ConfigError naming value and range.
    """

    target_s: float
    _allowance: float = 0.0  # prompts that may still be put off

    def __post_init__(self) -> None:
        if not 0 < self.target_s < math.inf:
            raise ConfigError(f"ttft target_s={self.target_s} is not above 0 and finite")

    def started(self) -> None:
        """One more of whom a share may be put off."""
        self._allowance = min(PUT_OFF_MOST, self._allowance + PUT_OFF_SHARE)

    def line(self, prompts: list[Sequence], now_s: float, cost: PromptCost | None, most: int) -> list[Sequence]:
        """See PromptOrder."""
        if cost is None:
            return Shortest().line(prompts, now_s, cost, most)
        while True:
            jobs = sorted([self._job(sequence, cost) for sequence in prompts], key=_by_deadline)
            largest = self._to_put_off(jobs, now_s) if self._allowance >= 1 else None
            if largest is None:
                return _shortest_in_time(jobs, now_s, most)
            self._allowance -= 1
            largest.put_off = True

    def _job(self, sequence: Sequence, cost: PromptCost) -> _Job:
        takes_s = cost.seconds(sequence.left, sequence.computed) / KEPT_SPEED
        if sequence.outputs:
            due_s = -math.inf
        elif sequence.put_off or cost.seconds(sequence.known, 0) > KEPT_SPEED * self.target_s:
            due_s = self._patient_due_s(sequence)
        else:
            due_s = sequence.arrival_s + self.target_s
        return _Job(sequence.request.priority, due_s, takes_s, sequence)

    def _patient_due_s(self, sequence: Sequence) -> float:
        return sequence.arrival_s + PATIENCE * self.target_s

    def _to_put_off(self, jobs: list[_Job], now_s: float) -> Sequence | None:
        """For whose time somebody of its priority would be late; None if nobody can be saved."""
        for _, group in groupby(jobs, key=attrgetter("priority")):
            peers = list(group)
            found = self._among(peers, now_s)
            if found is not None:
                return found
            now_s += sum(job.takes_s for job in peers)
        return None

    def _among(self, peers: list[_Job], began_s: float) -> Sequence | None:
        end_s, largest = began_s, peers[0]
        given_up: Sequence | None = None  # late, and larger than all before: without it, others behind may be in time
        given_up_s = 0.0
        for job in peers:
            end_s += job.takes_s
            if not self._may_wait(job):
                continue
            if given_up is not None and end_s <= job.due_s < end_s + given_up_s:
                return given_up
            beyond = not self._may_wait(largest) or job.takes_s > largest.takes_s
            if end_s <= job.due_s:
                largest = job if beyond else largest
            elif beyond:
                given_up = given_up or job.sequence
                given_up_s += job.takes_s
                end_s -= job.takes_s
            elif end_s - largest.takes_s <= job.due_s < self._patient_due_s(largest.sequence):
                return largest.sequence
        return None

    def _may_wait(self, job: _Job) -> bool:
        """Whether it could be put off."""
        return not job.sequence.outputs and job.due_s < self._patient_due_s(job.sequence)


def _by_deadline(job: _Job) -> tuple[int, float]:
    return job.priority, job.due_s


def _by_length(job: _Job) -> tuple[int, float]:
    return job.priority, job.takes_s


def _shortest_in_time(jobs: list[_Job], now_s: float, most: int) -> list[Sequence]:
    """The line by deadlines with the shortest called forward, as long as it makes nobody late who would not be."""
    by_length = sorted(jobs, key=_by_length)
    if _all_in_time(by_length, now_s):
        return [job.sequence for job in by_length]
    least_s = min(job.takes_s for job in jobs)
    first: list[Sequence] = []
    while jobs and most > 0 and len(first) < CALLED_FORWARD:
        best, end_s, spare_s = 0, now_s, math.inf  # spare_s: by which those ahead may be held up
        for i, job in enumerate(jobs):
            if spare_s < least_s:
                break
            if job.takes_s <= spare_s and _by_length(job) < _by_length(jobs[best]):
                best = i
            end_s += job.takes_s
            spare_s = min(spare_s, job.due_s - end_s)
        job = jobs.pop(best)
        first.append(job.sequence)
        most -= job.sequence.left
        now_s += job.takes_s
    return first + [job.sequence for job in jobs]


def _all_in_time(jobs: list[_Job], now_s: float) -> bool:
    for job in jobs:
        now_s += job.takes_s
        if now_s > job.due_s:
            return False
    return True
