"""The forced race: a kernel reads a slot's pages, and everything is tried that takes them away meanwhile.

With the fence set no page may be unmapped while the kernel is in flight, and the kernel may read nothing else; without
it the same must go wrong, or the check proves nothing (`control`, in a process of its own: it ends the context). That
the kernel is in flight is its own word, see gpu_reader. Knows no costs.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from scripts.gpu_allocator_checks import MIB, Bench, Found, acquire, need
from scripts.gpu_reader import Reader

if TYPE_CHECKING:
    from vattention_ext import KvAllocator

GROUPS = 40
HELD_S = 0.25  # how long the gate stays shut while the pages are wanted
OLD, NEW = 0x07070707, 0x09090909


def steal(kv: KvAllocator, old: int, new: int) -> None:
    """All pages of a released slot are wanted by another at once."""
    kv.release(old)
    need(kv.ensure(new, GROUPS * 32) is None, "the pages did not come")


def look_ahead(kv: KvAllocator, old: int, new: int) -> None:
    """The same, asked of the mapper, then by the foreground."""
    kv.release(old)
    kv.look_ahead([(new, GROUPS * 32)]).wait(5)
    need(kv.ensure(new, GROUPS * 32) is None, "the pages did not come")


def grow_back(kv: KvAllocator, old: int, new: int) -> None:
    """A slot is emptied and its own addresses are wanted again."""
    kv.trim(old, 0)
    need(kv.ensure(old, GROUPS * 32) is None, "the pages did not come")


def expire(kv: KvAllocator, old: int, new: int) -> None:
    """A released slot's pages go back to the GPU at once (release_after_s=0)."""
    kv.release(old)
    wait_until(lambda: kv.stats().physical_bytes == 0)


def lower_limit(kv: KvAllocator, old: int, new: int) -> None:
    """The limit falls below what a released slot keeps."""
    kv.release(old)
    kv.set_limit(1)
    wait_until(lambda: kv.stats().over_limit_groups == 0)


WAYS: dict[str, Callable[[KvAllocator, int, int], None]] = {
    way.__name__: way for way in (steal, look_ahead, grow_back, expire, lower_limit)
}


def wait_until(met: Callable[[], bool], limit_s: float = 8) -> None:
    """Raises RuntimeError when it takes longer."""
    deadline = time.perf_counter() + limit_s
    while not met():
        need(time.perf_counter() < deadline, "the pages were not given back")
        time.sleep(0.001)


def fill(bench: Bench, kv: KvAllocator, slot: int, value: int) -> None:
    """A 32-bit word, all over the slot's first plane."""
    at = ctypes.c_uint64(bench.address(kv, 0, slot))
    bench.cuda("cuMemsetD32_v2", at, ctypes.c_uint(value), ctypes.c_size_t(GROUPS * 2 * MIB // 4))
    bench.cuda("cuCtxSynchronize")


def moved(kv: KvAllocator) -> int:
    """Calls that take a page away or put one under an address."""
    calls = kv.stats().driver_calls
    return calls["unmap"] + calls["map"]


def race(bench: Bench, reader: Reader, way: str, *, fenced: bool) -> Found:
    """One race: what happened while the kernel was in flight, and how it ended ("error": the device's word)."""
    kv = bench.open(pool_groups=GROUPS, release_after_s=0.0 if way == "expire" else float("inf"))
    try:
        return run(bench, kv, reader, way, fenced=fenced)
    finally:
        reader.open()
        kv.close()


def run(bench: Bench, kv: KvAllocator, reader: Reader, way: str, *, fenced: bool) -> Found:
    """race() with an allocator at hand."""
    old, new = acquire(kv), acquire(kv)
    need(kv.ensure(old, GROUPS * 32) is None, "no pages")
    fill(bench, kv, old, OLD)
    before = moved(kv)
    reader.launch(bench.address(kv, 0, old), GROUPS * 2 * MIB, OLD << 32 | OLD)
    if fenced:
        kv.fence(reader.stream)
    failures: list[str] = []

    def take() -> None:
        try:
            WAYS[way](kv, old, new)
        except RuntimeError as error:
            failures.append(str(error))

    taker = threading.Thread(target=take)
    start = time.perf_counter()
    taker.start()
    taker.join(HELD_S)
    took_ms = (time.perf_counter() - start) * 1e3
    found: Found = {"in_flight": reader.in_flight, "moved": moved(kv) - before, "returned": not taker.is_alive(),
                    "ms": round(took_ms, 1), "passes": reader.passes, "error": None}  # fmt: skip
    stats = kv.stats()
    found["unmap_us"] = round(stats.driver_time_us["unmap"] / max(1, stats.driver_calls["unmap"]), 1)
    reader.open()
    try:
        found["wrong_words"] = reader.end()
    except RuntimeError as error:
        found["error"] = str(error)
        return found  # the context is gone
    taker.join(10)
    need(not taker.is_alive() and not failures, f"{way}: {failures or 'it hangs'}")
    if fenced:
        found["moved_after"] = moved(kv) - before
        if way in ("steal", "look_ahead"):
            fill(bench, kv, new, NEW)
            need(bench.cuda.read(bench.address(kv, 0, new)) == NEW << 32 | NEW, "its new owner cannot write it")
    return found


def check_race(bench: Bench) -> Found:
    """Every way, with the fence: nothing moves while the kernel is in flight, and it reads what it should."""
    reader = Reader(bench.cuda)
    passes = 0
    for way in WAYS:
        found = race(bench, reader, way, fenced=True)
        need(found["in_flight"], f"{way}: the kernel was not in flight: {found}")
        need(found["error"] is None and found["wrong_words"] == 0, f"{way}: the kernel read something else: {found}")
        need(found["moved"] == 0 and not found["returned"], f"{way}: pages moved under a kernel in flight: {found}")
        need(found["moved_after"] >= GROUPS, f"{way}: the pages were not taken afterwards: {found}")
        passes += found["passes"]
    reader.close()
    return {"ways": len(WAYS), "held_ms": int(HELD_S * 1e3), "passes_meanwhile": passes}


def control(bench: Bench, way: str) -> Found:
    """The same without the fence. fails: pages moved under the kernel, which faulted or read something else."""
    found = race(bench, Reader(bench.cuda), way, fenced=False)
    found["fails"] = found["moved"] > 0 and (found["error"] is not None or found["wrong_words"] > 0)
    return found
