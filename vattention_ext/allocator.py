"""KvAllocator: the native allocator with typed settings and statistics. Opens a driver by name; holds no memory itself.

The methods that a step calls are the native ones, inherited, so that nothing stands between.
"""

from __future__ import annotations

import math
from typing import Self

from . import _native
from .allocator_rules import require_pool
from .geometry import KvGeometry
from .values import KvStats

_NO_FAULT = ("any", 0, 1)


class KvAllocator(_native.Allocator):
    """Slots of virtual memory with physical page groups under them where tokens are.

    driver: "memfd" (Linux), "cuda" (GPU number `device`, through libcuda as the system finds it or from the path
    `libcuda`), or "fault" and "fault_cuda" (the same with injectable failures, for tests). pool_groups: most groups
    that exist at once; set_limit() changes it. release_after_s: a released slot's kept groups older than this are given
    back by the mapper thread (0: at once, inf: never by time), down to floor_groups. stock_groups: free groups that the
    mapper creates ahead while memory is being taken. max_mappings lowers the driver's own mapping budget.
    fault=(verb, nth, times) arms driver "fault" before its first verb. Thread-safe.
    Raises ValueError for a setting that cannot fit, DriverError where the system refuses addresses or the driver.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        driver: str = "memfd",
        *,
        device: int = 0,
        libcuda: str | None = None,
        pool_groups: int,
        release_after_s: float = math.inf,
        floor_groups: int = 0,
        stock_groups: int = 0,
        max_mappings: int | None = None,
        fault: tuple[str, int, int] = _NO_FAULT,
    ) -> None:
        require_pool(pool_groups, release_after_s, floor_groups, max_mappings, stock_groups)
        super().__init__(
            planes=geometry.planes,
            slots=geometry.slots,
            groups_per_slot=geometry.groups_per_slot,
            page_bytes=geometry.page_bytes,
            token_bytes=geometry.token_bytes,
            max_tokens=geometry.max_tokens,
            driver=driver,
            device=device,
            libcuda=libcuda or "",
            pool_groups=pool_groups,
            release_after_s=release_after_s,
            floor_groups=floor_groups,
            stock_groups=stock_groups,
            max_mappings=max_mappings or 0,
            fail_verb=fault[0],
            fail_nth=fault[1],
            fail_times=fault[2],
        )
        self.geometry = geometry

    def stats(self) -> KvStats:
        """Counts of this moment, consistent with each other. Also after close()."""
        return KvStats(**self._stats())

    def check(self) -> None:
        """Raises RuntimeError naming the first broken invariant. Waits for the mapper's unit in hand."""
        broken = self._check()
        if broken:
            raise RuntimeError(f"allocator invariant broken: {broken}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
