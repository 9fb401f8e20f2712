"""Who runs and who waits. It orders sequences; it does not know why one may start or must stop."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from engine.core.sequence import Sequence

_BY_ORDER = attrgetter("order")


class WaitingQueue:
    """First come, first served within a priority; lower priorities first. tokens: prefill that they all have left."""

    def __init__(self) -> None:
        self.tokens = 0
        self._lines: dict[int, deque[Sequence]] = {}  # priority -> its line; never an empty one
        self._priorities: list[int] = []  # sorted keys of _lines
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._priorities:
            yield from self._lines[priority]

    def _line(self, sequence: Sequence) -> deque[Sequence]:
        priority = sequence.request.priority
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = deque()
            insort(self._priorities, priority)
        self._count += 1
        self.tokens += sequence.left
        return line

    def append(self, sequence: Sequence) -> None:
        """Last of its priority: a new arrival."""
        self._line(sequence).append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """First of its priority: a victim, as upstream has it."""
        self._line(sequence).appendleft(sequence)

    def insert_by_arrival(self, sequence: Sequence) -> None:
        """Before the first one of its priority that came later: a victim never overtakes an older one."""
        line = self._line(sequence)
        place = 0
        age = (sequence.arrival_s, sequence.seq_id)
        while place < len(line) and (line[place].arrival_s, line[place].seq_id) < age:
            place += 1
        line.insert(place, sequence)

    def head(self, now_s: float) -> Sequence | None:
        """Who is next: the head of the best priority whose head has arrived by `now_s`."""
        for priority in self._priorities:
            sequence = self._lines[priority][0]
            if sequence.arrival_s <= now_s:
                return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take one out, from the head or anywhere. Raises ValueError when it is not there."""
        priority = sequence.request.priority
        line = self._lines.get(priority)
        if line is None:
            raise ValueError(f"{sequence!r} does not wait")
        line.remove(sequence)
        self._count -= 1
        self.tokens -= sequence.left
        if not line:
            del self._lines[priority]
            self._priorities.remove(priority)


class Queues:
    """running: sequences that hold memory, in the order of the last step; waiting: those that hold none.

    `in_order` says that `running` is known to be sorted by (priority, arrival), so that a step need not sort it.
    """

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self.in_order = True

    def sort_running(self) -> None:
        """Oldest of the best priority first; ties keep their places (stable), as upstream's sort."""
        if not self.in_order:
            self.running.sort(key=_BY_ORDER)
            self.in_order = True
