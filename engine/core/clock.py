"""Time as an argument: the only module that may read a clock.

Monotonic seconds order and time everything; wall time is for people (log lines, `created` fields) only.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where `now_s` comes from: monotonic seconds, never going back."""

    def now_s(self) -> float:
        """Monotonic seconds since an arbitrary start."""


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC; comparable between processes of one machine."""
        return time.monotonic()


class VirtualClock:
    """A clock that tests and replays set by hand."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        """The time last set."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. seconds >= 0."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds} is negative; a clock never goes back")
        self._now_s += seconds


def wall_s() -> float:
    """Seconds since the epoch, for people to read; never for ordering or timeouts."""
    return time.time()
