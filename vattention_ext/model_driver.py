"""A driver without memory: the verbs of csrc/driver.hpp on sets and dicts, with injectable failures. For the model.

Knows nothing of slots. It counts kernel mappings by looking at all pages each time, where the C++ counts edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import VERBS

_SPARE = 1 << 50  # file pages past every home
_SPLIT = 2  # kernel mappings that one more mapped page may add


class DriverError(Exception):
    """A verb failed. over_budget: because of the number of mappings."""

    def __init__(self, verb: str, over_budget: bool = False) -> None:
        super().__init__(verb)
        self.over_budget = over_budget


@dataclass
class ModelDriver:
    """page_bytes granular; addresses are page numbers. mapping_budget < 0: none."""

    mapping_budget: int = -1
    regions: dict[int, int] = field(default_factory=dict)  # first page number -> pages
    pages: set[int] = field(default_factory=set)
    mapped: dict[int, tuple[int, str]] = field(default_factory=dict)  # address -> (page, access)
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERBS, 0))
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERBS, 0))
    faults_fired: int = 0
    _fault: tuple[str, int, int] = ("any", 0, 1)
    _seen: int = 0

    def fail_at(self, verb: str, nth: int, times: int = 1) -> None:
        """Calls nth .. nth + times - 1 of `verb` ("any": of all) fail, counted from now; times < 0: for ever."""
        if verb not in (*VERBS, "any") or nth < 0:
            raise ValueError(f"verb={verb!r} or nth={nth} is wrong; verbs: any, {', '.join(VERBS)}; nth >= 0")
        self._fault, self._seen, self.faults_fired = (verb, nth, times), 0, 0

    def _call(self, verb: str) -> None:
        self.calls[verb] += 1
        wanted, nth, times = self._fault
        if nth == 0 or wanted not in ("any", verb):
            return
        self._seen += 1
        if self._seen >= nth and (times < 0 or self._seen < nth + times):
            self.faults_fired += 1
            self.failures[verb] += 1
            raise DriverError(verb)

    def reserve(self, pages: int) -> int:
        """First page number of a new range; a gap of one page keeps ranges apart."""
        self._call("reserve")
        start = max((first + size for first, size in self.regions.items()), default=0) + 1
        self.regions[start] = pages
        return start

    def unreserve(self, start: int) -> None:
        self._call("unreserve")
        size = self.regions.pop(start)
        for address in [a for a in self.mapped if start <= a < start + size]:
            del self.mapped[address]

    def create(self, home: int) -> int:
        """A page: `home` where that is free, else the lowest free one past all homes."""
        self._call("create")
        page = home
        if page in self.pages:
            page = _SPARE
            while page in self.pages:
                page += 1
        self.pages.add(page)
        return page

    def destroy(self, page: int) -> None:
        self._call("destroy")
        self.pages.remove(page)

    def map(self, address: int, page: int) -> None:
        self._call("map")
        assert page in self.pages and address not in self.mapped
        if 0 <= self.mapping_budget < self.mappings + _SPLIT:
            self.failures["map"] += 1
            raise DriverError("map", over_budget=True)
        self.mapped[address] = (page, "none")

    def allow(self, address: int, pages: int, access: str) -> None:
        self._call("allow")
        for at in range(address, address + pages):
            self.mapped[at] = (self.mapped[at][0], access)

    def unmap(self, address: int) -> None:
        self._call("unmap")
        del self.mapped[address]

    @property
    def mappings(self) -> int:
        """Kernel mappings: runs of pages that are alike (unmapped, or successive in the file with one access)."""
        runs = 0
        for start, size in self.regions.items():
            inside = sorted(a for a in self.mapped if start <= a < start + size)
            runs += 1
            for at in sorted({start, *inside, *(a + 1 for a in inside)} & set(range(start + 1, start + size))):
                here, before = self.mapped.get(at), self.mapped.get(at - 1)
                if here is None or before is None:
                    runs += here is not before
                else:
                    runs += here != (before[0] + 1, before[1])
        return runs
