"""KvModel: the allocator in plain Python, same API, same results, no memory. The oracle of the tests.

Nothing is cached or counted ahead: every number is recounted from the slots when it is asked for. Look-ahead runs
inside the call (its ticket is done at once), and kept groups expire by an argument instead of by a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .allocator_rules import require_pool
from .geometry import KvGeometry
from .model_driver import DriverError, ModelDriver
from .values import KvStats, OutOfPages, OutOfSlots, Wanted


@dataclass(eq=False)
class Group:
    """One page in every plane. holders: slots that map it; writer: the one that may write, or None."""

    serial: int
    pages: list[int] = field(default_factory=list)
    holders: set[int] = field(default_factory=set)
    writer: int | None = None


@dataclass
class Cell:
    """One index of one slot. planes: those still mapped; quarantined: an unmap failed."""

    group: Group
    planes: list[int]
    access: str = "none"
    quarantined: bool = False


@dataclass
class ModelSlot:
    """cells: what is mapped, by index. order: when it was released, of all releases."""

    active: bool = False
    tokens: int = 0
    order: int = 0
    cells: dict[int, Cell] = field(default_factory=dict)

    @property
    def mapped(self) -> list[int]:
        return sorted(i for i, cell in self.cells.items() if not cell.quarantined)

    @property
    def prefix(self) -> int:
        prefix = 0
        while prefix in self.cells and not self.cells[prefix].quarantined:
            prefix += 1
        return prefix

    @property
    def quarantined(self) -> list[int]:
        return sorted(i for i, cell in self.cells.items() if cell.quarantined)


@dataclass(frozen=True)
class ModelRegion:
    """Addresses of one plane, as numbers."""

    address: int
    nbytes: int


class ModelTicket:
    """Of work that is already done."""

    done = True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True


class KvModel:
    """See KvAllocator for every method and error; driver is "model" and takes fault=(verb, nth, times)."""

    def __init__(
        self,
        geometry: KvGeometry,
        driver: str = "model",
        *,
        device: int = 0,
        libcuda: str | None = None,
        pool_groups: int,
        release_after_s: float = math.inf,
        floor_groups: int = 0,
        stock_groups: int = 0,
        max_mappings: int | None = None,
        fault: tuple[str, int, int] = ("any", 0, 1),
    ) -> None:
        if driver != "model":
            raise ValueError(f"driver={driver!r} is unknown; known: model")
        require_pool(pool_groups, release_after_s, floor_groups, max_mappings, stock_groups)
        self.geometry = geometry
        self.closed = False
        self._total = self._highest = pool_groups
        self._floor = floor_groups
        self._driver = ModelDriver(-1 if max_mappings is None else max_mappings)
        self._driver.fail_at(*fault)
        self._slots = [ModelSlot() for _ in range(geometry.slots)]
        self._stranded: list[Group] = []
        self._arriving: list[Group] = []  # obtained for the growth under way, not placed yet
        self._releases = 0
        self._steps = 0
        self._made = 0
        self._count = dict.fromkeys(
            ("refusals", "stolen_groups", "reclaimed_groups", "failed_unmaps")
            + ("look_ahead_mapped", "look_ahead_given_up"),
            0,
        )
        self._bases: list[int] = []
        for _ in range(geometry.planes):
            try:
                self._bases.append(self._driver.reserve(geometry.slots * geometry.groups_per_slot))
            except DriverError as error:
                for base in self._bases:
                    self._driver.unreserve(base)
                raise RuntimeError("cannot reserve addresses") from error
        least = geometry.planes * (2 * min(geometry.slots, pool_groups) + 1) + 2
        if max_mappings is not None and least > max_mappings:
            raise ValueError(f"{geometry.slots} slots need at least {least} mappings, budget is {max_mappings}")

    # what exists ------------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        seen = {id(c.group): c.group for slot in self._slots for c in slot.cells.values()}
        seen.update((id(group), group) for group in (*self._stranded, *self._arriving))
        return list(seen.values())

    def _room(self) -> int:
        return self._total - len(self._groups())

    def _free(self) -> int:
        return max(0, self._room())

    def _kept(self) -> int:
        return sum(len(slot.mapped) for slot in self._slots if not slot.active)

    def _in_use(self, slot: int) -> int:
        return self.geometry.groups_for(self._slots[slot].tokens)

    def _look_ahead(self, self_slot: int, need: int) -> list[tuple[int, int]]:
        """(slot, index) of look-ahead groups: lowest slot first, its last index first; own ones only past `need`."""
        return [
            (number, index)
            for number, slot in enumerate(self._slots) if slot.active
            for index in reversed(slot.mapped)
            if index >= max(self._in_use(number), need if number == self_slot else 0)
        ]

    def _oldest_kept(self) -> tuple[int, int] | None:
        kept = [(slot.order, number) for number, slot in enumerate(self._slots) if not slot.active and slot.mapped]
        if not kept:
            return None
        number = min(kept)[1]
        return number, self._slots[number].mapped[-1]

    def _address(self, plane: int, slot: int, index: int) -> int:
        return self._bases[plane] + slot * self.geometry.groups_per_slot + index

    # single groups ----------------------------------------------------------------------------------------------

    def _create(self, slot: int, index: int) -> Group | None:
        """A new group with all its pages, or None and nothing left of it (stranded where destroying fails)."""
        self._made += 1
        group, g = Group(self._made), self.geometry
        try:
            for plane in range(g.planes):
                home = (plane * g.slots + slot) * g.groups_per_slot + index
                group.pages.append(self._driver.create(home))
        except DriverError:
            self._retire(group)
            return None
        return group

    def _retire(self, group: Group) -> bool:
        for page in list(reversed(group.pages)):
            try:
                self._driver.destroy(page)
            except DriverError:
                continue
            group.pages.remove(page)
        if group.pages:
            self._stranded.append(group)
        return not group.pages

    def _unmap_planes(self, slot: int, index: int, planes: list[int]) -> list[int]:
        """Unmaps, last plane first; those that failed."""
        failed: list[int] = []
        for plane in reversed(planes):
            try:
                self._driver.unmap(self._address(plane, slot, index))
            except DriverError:
                failed.insert(0, plane)
        return failed

    def _detach(self, slot: int, index: int) -> tuple[bool, Group | None]:
        """Unmaps a cell: (done, its group if nobody holds it any more). Not done: it is quarantined."""
        cell = self._slots[slot].cells[index]
        cell.planes = self._unmap_planes(slot, index, cell.planes)
        if cell.planes:
            cell.quarantined = True
            self._count["failed_unmaps"] += 1
            return False, None
        del self._slots[slot].cells[index]
        group = cell.group
        group.holders.discard(slot)
        if group.writer == slot:
            group.writer = None
            self._pass_on_writing(group, index)
        return True, None if group.holders else group

    def _pass_on_writing(self, group: Group, index: int) -> None:
        heirs = [h for h in sorted(group.holders) if not self._slots[h].cells[index].quarantined]
        if not heirs:
            return
        try:
            self._allow(heirs[0], index, 1, "read_write")
        except DriverError:
            try:
                self._allow(heirs[0], index, 1, "read")
            except DriverError:
                pass
            return
        group.writer = heirs[0]
        self._slots[heirs[0]].cells[index].access = "read_write"

    def _allow(self, slot: int, first: int, count: int, access: str) -> None:
        for plane in range(self.geometry.planes):
            self._driver.allow(self._address(plane, slot, first), count, access)

    def _drop(self, slot: int, index: int) -> bool:
        done, last = self._detach(slot, index)
        if last is not None:
            self._retire(last)
        return done

    def _steal(self, place: tuple[int, int]) -> Group | None:
        group = self._detach(*place)[1]
        self._count["stolen_groups"] += group is not None
        return group

    def _heal(self, slot: int, indexes: list[int]) -> bool:
        return all([self._drop(slot, index) for index in indexes])

    def _heal_all(self) -> int:
        before = self._room()
        for number, slot in enumerate(self._slots):
            self._heal(number, slot.quarantined)
        stranded, self._stranded = self._stranded, []
        for group in stranded:
            self._retire(group)
        return self._room() - before

    def _give_back(self, keep: int) -> int:
        before = self._room()
        while self._kept() > keep:
            place = self._oldest_kept()
            assert place is not None
            self._drop(*place)
        return self._room() - before

    # growth -----------------------------------------------------------------------------------------------------

    def _refuse(self, reason: str, requested: int, free: int) -> OutOfPages:
        self._count["refusals"] += 1
        return OutOfPages(requested, free, self._total, reason)

    def ensure(self, slot: int, tokens: int) -> OutOfPages | None:
        need = self._check_call(slot, tokens)
        cells = self._slots[slot]
        if need > cells.prefix:
            if not self._heal(slot, [i for i in cells.quarantined if i < need]):
                return self._refuse("driver", need - cells.prefix, self._free())
            missing = [i for i in range(need) if i not in cells.cells]
            cheap = self._room() + self._kept()
            available = cheap if cheap >= len(missing) else cheap + len(self._look_ahead(slot, need))
            if available < len(missing) and self._heal_all() > 0:
                cheap = self._room() + self._kept()
                available = cheap if cheap >= len(missing) else cheap + len(self._look_ahead(slot, need))
            if available < len(missing):
                return self._refuse("pages", len(missing), max(0, available))
            reason = self._grow(slot, missing, need)
            if reason:
                free = self._room() + self._kept() + len(self._look_ahead(slot, need))
                return self._refuse(reason, len(missing), max(0, free))
        cells.tokens = max(cells.tokens, tokens)
        return None

    def ensure_many(self, wanted: Wanted) -> list[int]:
        for slot, tokens in wanted:
            self._check_call(slot, tokens)
        return [i for i, (slot, tokens) in enumerate(wanted) if self.ensure(slot, tokens) is not None]

    def _grow(self, slot: int, missing: list[int], need: int) -> str:
        try:
            for index in missing:
                group = self._obtain(slot, index, need)
                if group is None:
                    self._undo(slot, [(i, g, []) for i, g in zip(missing, self._arriving, strict=False)])
                    return "driver"
                self._arriving.append(group)
            return self._place(slot, list(zip(missing, self._arriving, strict=True)), "read_write")
        finally:
            self._arriving = []

    def _obtain(self, slot: int, index: int, need: int) -> Group | None:
        group = self._create(slot, index) if self._free() > 0 else None
        while group is None:
            ahead = self._look_ahead(slot, need)
            place = self._oldest_kept() or (ahead[0] if ahead else None)
            if place is None:
                return None
            group = self._steal(place)
        return group

    def _place(self, slot: int, arrivals: list[tuple[int, Group]], access: str) -> str:
        """Maps all groups at their indexes, or nothing and the reason."""
        placed: list[tuple[int, Group, list[int]]] = [(i, g, []) for i, g in arrivals]
        try:
            for index, group, planes in placed:
                for plane in range(self.geometry.planes):
                    self._map_or_relieve(self._address(plane, slot, index), group.pages[plane])
                    planes.append(plane)
            start = 0
            for end in range(1, len(placed) + 1):
                if end == len(placed) or placed[end][0] != placed[end - 1][0] + 1:
                    self._allow(slot, placed[start][0], end - start, access)
                    start = end
        except DriverError as error:
            self._undo(slot, placed)
            return "mappings" if error.over_budget else "driver"
        for index, group, planes in placed:
            group.holders.add(slot)
            if access == "read_write":
                group.writer = slot
            self._slots[slot].cells[index] = Cell(group, planes, access)
        return ""

    def _map_or_relieve(self, address: int, page: int) -> None:
        while True:
            try:
                return self._driver.map(address, page)
            except DriverError as error:
                if not error.over_budget or not self._kept():
                    raise
                self._count["reclaimed_groups"] += self._give_back(self._kept() - 1)

    def _undo(self, slot: int, placed: list[tuple[int, Group, list[int]]]) -> None:
        for index, group, planes in reversed(placed):
            failed = self._unmap_planes(slot, index, planes)
            if failed:
                self._count["failed_unmaps"] += 1
                group.holders.add(slot)
                self._slots[slot].cells[index] = Cell(group, failed, quarantined=True)
            elif not group.holders:
                self._retire(group)

    def share(self, src_slot: int, dst_slot: int, groups: int) -> OutOfPages | None:
        self._check_call(src_slot)
        self._check_call(dst_slot)
        source, target = self._slots[src_slot], self._slots[dst_slot]
        if src_slot == dst_slot or not 0 <= groups <= self._in_use(src_slot):
            raise ValueError(f"cannot share {groups} groups of slot {src_slot} with slot {dst_slot}")
        arrivals = []
        for index in range(self._in_use(dst_slot), groups):
            if index in target.cells and not self._drop(dst_slot, index):
                return self._refuse("driver", groups, self._free())
            arrivals.append((index, source.cells[index].group))
        reason = self._place(dst_slot, arrivals, "read")
        if reason:
            return self._refuse(reason, groups, self._free())
        target.tokens = max(target.tokens, self.geometry.tokens_in(groups))
        return None

    def look_ahead(self, wanted: Wanted) -> ModelTicket:
        for slot, tokens in wanted:
            self._check_call(slot, tokens)
        for slot, tokens in wanted:
            while self._slots[slot].prefix < self.geometry.groups_for(tokens):
                if not self._map_one(slot, self._slots[slot].prefix):
                    self._count["look_ahead_given_up"] += 1
                    break
                self._count["look_ahead_mapped"] += 1
        return ModelTicket()

    def _map_one(self, slot: int, index: int) -> bool:
        if index in self._slots[slot].cells:
            return False
        if self._free() > 0:
            group = self._create(slot, index)
        else:
            place = self._oldest_kept()
            group = self._steal(place) if place else None
        if group is None:
            return False
        planes: list[int] = []
        try:
            for plane in range(self.geometry.planes):
                self._driver.map(self._address(plane, slot, index), group.pages[plane])
                planes.append(plane)
            self._allow(slot, index, 1, "read_write")
        except DriverError:
            self._undo(slot, [(index, group, planes)])
            return False
        group.holders.add(slot)
        group.writer = slot
        self._slots[slot].cells[index] = Cell(group, planes, "read_write")
        return True

    # the rest ---------------------------------------------------------------------------------------------------

    def _check_call(self, slot: int, tokens: int = 0, *, active: bool = True) -> int:
        if self.closed:
            raise RuntimeError("the allocator is closed")
        if not 0 <= slot < len(self._slots) or (active and not self._slots[slot].active):
            raise ValueError(f"slot={slot} is not in 0..{len(self._slots) - 1} or not acquired")
        return self.geometry.groups_for(tokens)

    def acquire(self, tokens: int) -> int | OutOfSlots:
        need = self._check_call(0, tokens, active=False)
        open_slots = [n for n, slot in enumerate(self._slots) if not slot.active and not slot.quarantined]
        if not open_slots:
            self._count["refusals"] += 1
            return OutOfSlots(len(self._slots))
        sizes = {n: len(self._slots[n].mapped) for n in open_slots}
        enough = [n for n in open_slots if sizes[n] >= need]
        best = min(enough, key=lambda n: (sizes[n], n)) if enough else min(open_slots, key=lambda n: (-sizes[n], n))
        self._slots[best].active = True
        return best

    def _drop_shared_from(self, slot: int, first: int) -> None:
        for index in reversed(self._slots[slot].mapped):
            group = self._slots[slot].cells[index].group
            if index >= first and (group.holders != {slot} or group.writer != slot):
                self._drop(slot, index)

    def set_tokens(self, slot: int, tokens: int) -> None:
        need = self._check_call(slot, tokens)
        if need > self._slots[slot].prefix:
            raise ValueError(f"tokens={tokens} are more than slot {slot} has mapped; use ensure()")
        self._slots[slot].tokens = tokens
        self._drop_shared_from(slot, need)

    def trim(self, slot: int, tokens: int) -> None:
        self.set_tokens(slot, tokens)
        for index in reversed(self._slots[slot].mapped):
            if index >= self._in_use(slot):
                self._drop(slot, index)

    def release(self, slot: int) -> None:
        self._check_call(slot)
        self._slots[slot].tokens = 0
        self._drop_shared_from(slot, 0)
        self._releases += 1
        self._slots[slot].active = False
        self._slots[slot].order = self._releases
        self._shrink()

    def reclaim(self, keep_groups: int | None = None) -> int:
        self._check_call(0, active=False)
        if keep_groups is not None and keep_groups < 0:
            raise ValueError(f"keep_groups={keep_groups} is negative")
        freed = self._heal_all() + self._give_back(self._floor if keep_groups is None else keep_groups)
        self._count["reclaimed_groups"] += freed
        return freed

    def mapped_tokens(self, slot: int) -> int:
        self._check_call(slot, active=False)
        return self.geometry.tokens_in(self._slots[slot].prefix)

    def tokens(self, slot: int) -> int:
        self._check_call(slot, active=False)
        return self._slots[slot].tokens

    def fence(self, stream: int = 0) -> None:
        """Nothing runs beside the model: a fence has passed at once."""
        self._check_call(0, active=False)
        self._steps += 1

    def stalls_us(self) -> list[float]:
        return [0.0] * self._steps

    def set_limit(self, groups: int) -> None:
        """What the mapper does afterwards is done at once here, and again after every release()."""
        self._check_call(0, active=False)
        if groups < 1:
            raise ValueError(f"groups={groups} is less than 1")
        self._total = groups
        self._highest = max(self._highest, groups)
        self._shrink()

    def _shrink(self) -> None:
        while self._room() < 0:
            ahead = self._look_ahead(-1, 0)
            place = self._oldest_kept() or (ahead[0] if ahead else None)
            if place is None:
                return
            self._count["reclaimed_groups"] += self._drop(*place)

    def device_memory(self) -> tuple[int, int]:
        return -1, -1

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for number, slot in enumerate(self._slots):
            for index in sorted(slot.cells, reverse=True):
                self._drop(number, index)
        stranded, self._stranded = self._stranded, []
        for group in stranded:
            self._retire(group)
        for base in self._bases:
            try:
                self._driver.unreserve(base)
            except DriverError:
                pass

    @property
    def regions(self) -> list[ModelRegion]:
        g = self.geometry
        return [] if self.closed else [ModelRegion(base * g.page_bytes, g.region_bytes) for base in self._bases]

    def fail_at(self, verb: str, nth: int, times: int = 1) -> None:
        self._driver.fail_at(verb, nth, times)

    @property
    def faults_fired(self) -> int:
        return self._driver.faults_fired

    def cell_group(self, slot: int, index: int) -> int | None:
        """Serial number of the group mapped there, for tests of contents; None where nothing usable is."""
        cell = self._slots[slot].cells.get(index)
        return None if cell is None or cell.quarantined else cell.group.serial

    def is_active(self, slot: int) -> bool:
        """The slot is acquired."""
        return self._slots[slot].active

    def writable(self, slot: int, index: int) -> bool:
        """A usable group is mapped there and this slot may write it."""
        cell = self._slots[slot].cells.get(index)
        return cell is not None and not cell.quarantined and cell.access == "read_write"

    def stats(self) -> KvStats:
        kinds: dict[int, int] = {}
        mapped_pages = shared_pages = 0
        for number, slot in enumerate(self._slots):
            for index, cell in slot.cells.items():
                kind = 3 if cell.quarantined else 2 if not slot.active else int(index >= self._in_use(number))
                kinds[id(cell.group)] = min(kinds.get(id(cell.group), 3), kind)
                if cell.access == "read_write":
                    mapped_pages += len(cell.planes)
                else:
                    shared_pages += len(cell.planes)
        counts = [list(kinds.values()).count(kind) for kind in range(4)]
        groups = self._groups()
        page = self.geometry.page_bytes
        return KvStats(
            total_groups=self._total,
            free_groups=self._free(),
            in_use_groups=counts[0],
            look_ahead_groups=counts[1],
            kept_groups=counts[2],
            quarantined_groups=counts[3] + len(self._stranded),
            moving_groups=0,
            stocked_groups=0,
            over_limit_groups=max(0, -self._room()),
            leaving_positions=0,
            quarantined_positions=sum(len(slot.quarantined) for slot in self._slots),
            shared_groups=sum(len(group.holders) > 1 for group in groups),
            read_only_groups=sum(bool(group.holders) and group.writer is None for group in groups),
            active_slots=sum(slot.active for slot in self._slots),
            mapped_bytes=mapped_pages * page,
            shared_bytes=shared_pages * page,
            physical_bytes=len(groups) * self.geometry.group_bytes,
            queued_jobs=0,
            steps=self._steps,
            pending_fences=0,
            mappings=self._driver.mappings,
            mapping_budget=self._driver.mapping_budget,
            descriptor=-1,
            inode=-1,
            map_wait_us=0.0,
            grow_us=0.0,
            fence_wait_us=0.0,
            last_error="",
            driver_calls=dict(self._driver.calls),
            driver_failures=dict(self._driver.failures),
            driver_time_us=dict.fromkeys(self._driver.calls, 0.0),
            **self._count,
        )

    def check(self) -> None:
        """Raises RuntimeError when the slots and the driver disagree on what is mapped or exists."""
        mapped = {}
        for number, slot in enumerate(self._slots):
            if slot.active and not self.closed and self._in_use(number) > slot.prefix:
                raise RuntimeError(f"slot {number} uses what is not mapped")
            for index, cell in slot.cells.items():
                for plane in cell.planes:
                    mapped[self._address(plane, number, index)] = cell.group.pages[plane]
        if not self.closed and mapped != {a: page for a, (page, _) in self._driver.mapped.items()}:
            raise RuntimeError("slots and driver disagree on what is mapped")
        pages = [page for group in self._groups() for page in group.pages]
        if sorted(pages) != sorted(self._driver.pages):
            raise RuntimeError("groups and driver disagree on which pages exist")
        if len(self._groups()) > self._highest:
            raise RuntimeError("more groups than the pool has")
