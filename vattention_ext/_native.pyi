"""Types of the C++ module: what bindings.cpp defines. Use vattention_ext.KvAllocator."""

from typing import Any

from .values import OutOfPages, OutOfSlots, Wanted

class Region:
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __dlpack__(self, **kwargs: Any) -> Any:
        """uint8, shape (nbytes,), on the driver's device; no copy. Raises BufferError for copy=True."""

    def __dlpack_device__(self) -> tuple[int, int]: ...

class Ticket:
    @property
    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...

class Allocator:
    """All calls raise ValueError for a wrong slot or count and RuntimeError once closed, unless said otherwise."""

    def __init__(
        self,
        *,
        planes: int,
        slots: int,
        groups_per_slot: int,
        page_bytes: int,
        token_bytes: int,
        max_tokens: int,
        driver: str,
        device: int,
        libcuda: str,
        pool_groups: int,
        release_after_s: float,
        floor_groups: int,
        stock_groups: int,
        max_mappings: int,
        fail_verb: str,
        fail_nth: int,
        fail_times: int,
    ) -> None: ...
    def acquire(self, tokens: int) -> int | OutOfSlots:
        """A slot for a request of `tokens` tokens: the released one whose kept groups fit best. Maps nothing."""

    def ensure(self, slot: int, tokens: int) -> OutOfPages | None:
        """Maps groups_for(tokens) groups, all or none, and counts them as in use. Never shrinks.

        Waits for the mapper's unit in hand on this slot. Takes pages from the pool, then from released slots (the
        longest released first), then look-ahead pages of other slots.
        """

    def ensure_many(self, wanted: Wanted) -> list[int]:
        """ensure() for each pair, in order; the indexes of those refused. A wrong pair raises and nothing is done."""

    def look_ahead(self, wanted: Wanted) -> Ticket:
        """Asks the mapper thread to map each slot up to `tokens`, best effort, from free and kept groups."""

    def set_tokens(self, slot: int, tokens: int) -> None:
        """Tokens in use, down or up to what is mapped; pages beyond stay mapped as look-ahead, shared ones do not."""

    def trim(self, slot: int, tokens: int) -> None:
        """set_tokens(), then gives the pages beyond back at once."""

    def release(self, slot: int) -> None:
        """Ends the slot's request. Private pages stay mapped (kept) until someone needs them or they expire.

        Kernels launched before the last fence() may still read and write the slot; others must not.
        """

    def fence(self, stream: int = 0) -> None:
        """Ends a step: to be called right after its launches on `stream` (a CUstream as a number; 0: the default one),
        before anything of the step is released, and never while the stream is captured into a graph.

        Pages that leave use after it are not unmapped, nor given to another slot, before everything launched until now
        is through. A few microseconds; never waits. Drivers without a device only count the step. Raises DriverError
        where the device cannot be followed any more.
        """

    def stalls_us(self) -> list[float]:
        """Foreground time spent growing or waiting, by step (fence to fence), of the latest 8,192, oldest first."""

    def set_limit(self, groups: int) -> None:
        """Most groups that may exist from now on. Takes nothing that is in use: while more live than that, growth is
        refused, and the mapper gives back kept groups (below the floor, too), then look-ahead, as soon as it may."""

    def device_memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device, all processes together; (-1, -1) where the driver does not know."""

    def share(self, src_slot: int, dst_slot: int, groups: int) -> OutOfPages | None:
        """Maps the first `groups` groups in use of src_slot into dst_slot, too, read-only there. All or none.

        Groups that dst_slot already uses stay. Afterwards dst_slot has at least tokens_in(groups) tokens. The groups
        must lie wholly in computed tokens (KvGeometry.shareable_groups) and nobody may write them any more.
        """

    def reclaim(self, keep_groups: int | None = None) -> int:
        """Gives kept groups back until keep_groups (default: the floor) are left, empties the stock, and retries
        quarantined groups. Leaves what kernels in flight may still read. Returns the groups that became free.
        """

    def mapped_tokens(self, slot: int) -> int:
        """Whole tokens that lie in the slot's mapped pages, from its start."""

    def tokens(self, slot: int) -> int:
        """Tokens in use."""

    def _stats(self) -> dict[str, Any]: ...
    def _check(self) -> str: ...
    def close(self) -> None:
        """Stops the mapper, cancels tickets, unmaps and frees everything. Idempotent; waits for a close under way."""

    @property
    def closed(self) -> bool: ...
    @property
    def regions(self) -> list[Region]:
        """mega: [K, V]; per_layer: [K0 .. K(L-1), V0 .. V(L-1)]. Empty once closed."""

    def fail_at(self, verb: str, nth: int, times: int = 1) -> None:
        """Driver "fault": calls nth .. nth + times - 1 of `verb` ("any": of all), counted from now, fail; times < 0:
        for ever; nth 0 clears. Raises ValueError for other drivers."""

    @property
    def faults_fired(self) -> int: ...
