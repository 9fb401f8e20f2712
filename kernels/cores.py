"""How many cores a process may keep busy: those it may run on, and no more time than its control groups are given.

A container with a quota of time sees every core of its machine; a thread too many that waits without pause stops all of
its threads for the rest of a period.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Seconds of CPU time a second, by control groups of version 2 or 1; infinite where none says anything."""
    least = math.inf
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for group in (Path(own), *Path(own).parents):  # seen from inside, a container's group is the root
            folder = root / controllers / group.relative_to("/")
            try:
                if controllers:
                    given, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    given, period = (folder / "cpu.max").read_text().split()
            except OSError:
                continue
            if given.strip() not in ("max", "-1"):
                least = min(least, int(given) / int(period))
    return least


def usable_cores() -> int:
    """At least 1."""
    return max(1, int(min(len(os.sched_getaffinity(0)), quota())))
