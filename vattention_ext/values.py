"""What the allocator answers with: refusals, statistics and the shape of its handles. Plain data, no allocator.

The native extension and the Python model return the same classes, so that callers cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

VERBS: tuple[str, ...] = ("reserve", "unreserve", "create", "destroy", "map", "allow", "unmap")
"""The verbs of a driver, in the order in which a page lives."""


class DriverError(RuntimeError):
    """A driver does not work: it cannot be opened, or can no longer say what its device does. Not a lack of pages."""


@dataclass(frozen=True, slots=True)
class OutOfPages:
    """A growth or a share that was not done; nothing of it remains. Falsy. Retry after something was released.

    requested_groups: groups this call would have mapped. free_groups: obtainable when it was refused (never created,
    kept by released slots, or look-ahead of others). reason: "pages" (too few are left), "mappings" (the process may
    hold no more kernel mappings), "memory" (the books allow it and the system has none) or "driver" (a call failed).
    """

    requested_groups: int
    free_groups: int
    total_groups: int
    reason: str = "pages"

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class OutOfSlots:
    """No slot is free to acquire. Falsy. total_slots counts active and quarantined ones."""

    total_slots: int

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class KvStats:
    """One moment of an allocator. A physical group is counted once, in the most urgent of its states:

    total + over_limit = free + in_use + look_ahead + kept + quarantined + moving. in_use: holds tokens computed or in
    flight. look_ahead: mapped beyond them in an active slot. kept: mapped in a released slot. quarantined: an unmap or
    destroy failed. moving: in the mapper's hands at this moment (0 when its tickets are done and nothing expires), or
    leaving: mapped only until the kernels launched before its fence are through (leaving_positions, shared ones too).
    stocked: of the free ones, created ahead. over_limit: live beyond a limit that was lowered; they end as they are
    released. shared_groups (mapped in several slots) and read_only_groups (in no slot writable) are contained in these.
    mapped_bytes are virtual and writable, shared_bytes virtual and read-only, physical_bytes committed.
    driver_*: by verb, since the start; last_error: in the driver's words. map_wait_us: foreground time spent waiting
    for the mapper; fence_wait_us: for kernels in flight; grow_us: spent growing; stalls_us() has their sum by step.
    steps: fences set; pending_fences: not passed yet. mappings, mapping_budget, descriptor, inode: -1 where the driver
    has no such thing.
    """

    total_groups: int
    free_groups: int
    in_use_groups: int
    look_ahead_groups: int
    kept_groups: int
    quarantined_groups: int
    moving_groups: int
    stocked_groups: int
    over_limit_groups: int
    leaving_positions: int
    quarantined_positions: int
    shared_groups: int
    read_only_groups: int
    active_slots: int
    mapped_bytes: int
    shared_bytes: int
    physical_bytes: int
    refusals: int
    stolen_groups: int
    reclaimed_groups: int
    failed_unmaps: int
    look_ahead_mapped: int
    look_ahead_given_up: int
    queued_jobs: int
    steps: int
    pending_fences: int
    mappings: int
    mapping_budget: int
    descriptor: int
    inode: int
    map_wait_us: float
    grow_us: float
    fence_wait_us: float
    last_error: str
    driver_calls: dict[str, int]
    driver_failures: dict[str, int]
    driver_time_us: dict[str, float]


class Region(Protocol):
    """One plane of the slab: slots * slot_bytes of addresses, most of them unmapped (touching those is a SIGSEGV;
    on a GPU an illegal access, which ends the context).

    `torch.from_dlpack(region)` is a uint8 tensor of shape (nbytes,) over it, without a copy and without touching it.
    The addresses stay reserved while the region or such a tensor lives, also after close().
    """

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Ticket(Protocol):
    """Future of one look_ahead()."""

    @property
    def done(self) -> bool:
        """Every slot asked for was mapped, given up or cancelled."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until done, at most timeout_s seconds; returns done."""
        ...


Wanted = Sequence[tuple[int, int]]
"""(slot, tokens) each."""
