"""Races of the allocator, each forced in this process; test_races.py starts one of them and waits with a limit.

    python -m tests.ext.race_child NAME SECONDS
"""

from __future__ import annotations

import faulthandler
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.ext.fake import fake_cuda
from tests.ext.support import assert_clean, geometry, groups, make
from vattention_ext import KvGeometry


def churn_cuda(seconds: float) -> None:
    """The same through libcuda's calls."""
    churn(seconds, "cuda")
    assert_clean("cuda")


def kernels_in_flight(seconds: float) -> None:
    """Steps of random sequences on a GPU that runs when it likes, at most two behind, with a pool that is too small, a
    mapper, and an administrator: no page under a kernel in flight is unmapped, and every kernel finds its pages."""
    fake, chance, steps = fake_cuda(), random.Random(3), 0
    fake.automatic(False)
    kv = make("cuda", geometry("mega", slots=8), pool_groups=18, release_after_s=0.001, stock_groups=2)
    end = time.perf_counter() + seconds
    failures: list[BaseException] = []
    over = threading.Event()

    def guarded(work: Callable[[random.Random], None], seed: int) -> threading.Thread:
        def run() -> None:
            try:
                while not over.is_set() and not failures:
                    work(random.Random(seed * 1000 + steps))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def gpu(chance: random.Random) -> None:
        time.sleep(chance.random() * 0.001)
        fake.advance(1, chance.randint(1, 6))

    def administrator(chance: random.Random, kv: Any = kv) -> None:
        kv.check()
        groups(kv.stats())
        kv.set_limit(chance.randint(10, 18))
        if chance.random() < 0.2:
            kv.reclaim(chance.randint(0, 3))
        time.sleep(0.001)

    threads = [guarded(gpu, 1), guarded(administrator, 2)]
    running: dict[int, int] = {}
    while time.perf_counter() < end and not failures:
        while kv.stats().pending_fences > 2:  # as an engine that plans one step ahead
            time.sleep(0.0002)
        for _ in range(chance.randint(0, 2)):
            slot = kv.acquire(chance.randint(0, 50))
            if isinstance(slot, int):
                running[slot] = 0
                if running and chance.random() < 0.4:
                    source = chance.choice(list(running))
                    full = kv.geometry.shareable_groups(kv.tokens(source))
                    if source != slot and full and kv.share(source, slot, full) is None:
                        running[slot] = kv.tokens(slot)
        for slot in list(running):
            running[slot] = min(50, running[slot] + chance.choice((1, 1, 12)))
            if kv.ensure(slot, running[slot]) is not None:
                kv.release(slot)  # preempted, while the last step may still read it
                del running[slot]
        for slot in running:
            g = kv.geometry
            for region in kv.regions:
                size = g.groups_for(running[slot]) * g.page_bytes
                fake.launch(1, region.address + slot * g.slot_bytes, size)
        kv.fence(1)
        kv.look_ahead([(slot, min(50, tokens + 1)) for slot, tokens in running.items()])
        for slot in list(running):
            fate = chance.random()
            if fate < 0.1 or running[slot] == 50:
                kv.release(slot)
                del running[slot]
            elif fate < 0.15:
                running[slot] //= 2
                kv.trim(slot, running[slot])
            elif fate < 0.2:
                running[slot] //= 3
                kv.set_tokens(slot, running[slot])
        steps += 1
    over.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    stats = kv.stats()
    assert steps > 20 and stats.look_ahead_mapped > 0 and stats.stolen_groups > 0, (steps, stats)
    for slot in running:
        kv.release(slot)
    fake.advance(1)
    kv.close()
    del region  # addresses stay reserved while a region lives
    assert fake.violations() == []


def churn(seconds: float, kind: str = "memfd") -> None:
    """Four threads acquire, grow, look ahead, share, shrink and release slots of one small pool; one looks."""
    kv = make(kind, geometry("mega", slots=12), pool_groups=30, release_after_s=0.002, floor_groups=1)
    end = time.perf_counter() + seconds
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            while time.perf_counter() < end and not failures:
                work()
        except BaseException as error:
            failures.append(error)

    def worker(seed: int) -> Callable[[], None]:
        chance = random.Random(seed)

        def work() -> None:
            slots = [s for s in (kv.acquire(20), kv.acquire(5)) if isinstance(s, int)]
            for _ in range(chance.randint(1, 20)):
                for slot in slots:
                    tokens = min(50, kv.tokens(slot) + chance.randint(0, 12))
                    if kv.ensure(slot, tokens) is None:
                        assert kv.mapped_tokens(slot) >= tokens == kv.tokens(slot)
                    kv.look_ahead([(slot, min(50, tokens + 12))])
                    if chance.random() < 0.1:
                        kv.trim(slot, kv.tokens(slot) // 2)
            if len(slots) == 2 and chance.random() < 0.5:
                kv.set_tokens(slots[1], 0)
                kv.share(slots[0], slots[1], kv.geometry.shareable_groups(kv.tokens(slots[0])))
            for slot in slots:
                kv.release(slot)

        return work

    def look() -> None:
        kv.check()
        groups(kv.stats())
        time.sleep(0.001)

    works = [*(worker(seed) for seed in range(4)), look]
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert kv.stats().look_ahead_mapped > 0
    kv.reclaim(0)
    assert groups(kv.stats()) == {"free": 30}
    kv.close()


def close_while_busy(seconds: float) -> None:
    """close() in the middle of a long queue: it returns, every ticket is done, every page is back."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        kv = make("memfd", geometry("per_layer", slots=8, max_tokens=400), pool_groups=200)
        slots = [kv.acquire(0) for _ in range(8)]
        tickets = [kv.look_ahead([(slot, 400) for slot in slots]) for _ in range(5)]
        while kv.stats().look_ahead_mapped < 3:
            pass
        waiting = threading.Thread(target=tickets[-1].wait)
        waiting.start()
        kv.close()
        waiting.join()
        assert all(ticket.done for ticket in tickets)
        kv.check()
        assert kv.stats().free_groups == 200


def release_while_mapping(seconds: float) -> None:
    """A released slot gets no further look-ahead, and what was mapped for it is kept, whole, for the next."""
    kv = make("memfd", geometry(max_tokens=400), pool_groups=150)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        slot = kv.acquire(400)
        ticket = kv.look_ahead([(slot, 400)])
        kv.release(slot)
        kept = kv.stats().kept_groups
        assert ticket.wait(30)
        stats = kv.stats()
        assert stats.kept_groups == kept and stats.look_ahead_groups == 0
        slot, mapped = kv.acquire(400), stats.look_ahead_mapped
        ticket = kv.look_ahead([(slot, 400)])
        while not ticket.done and kv.stats().look_ahead_mapped < mapped + 2:
            pass
        kv.release(slot)
        kept = kv.stats().kept_groups
        assert kv.acquire(400) == slot, "the next request gets the pages"
        assert ticket.wait(30)
        assert kv.stats().look_ahead_groups == kept, "and not what the last one had asked for"
        kv.release(slot)
        kv.reclaim(0)
        assert groups(kv.stats()) == {"free": 150}
    kv.close()


def foreground_beats_look_ahead(seconds: float) -> None:
    """Pages that the mapper took, or holds in its hands, are never missing to a growth that the books allow."""
    end = time.perf_counter() + seconds
    chance = random.Random(1)
    large = KvGeometry(30, 3, 64, 2, 450, 4, 1 << 20)  # a page takes long enough to be met half way
    assert large.groups_per_slot == 5
    while time.perf_counter() < end:
        kv = make("memfd", large, pool_groups=5)
        a, b = kv.acquire(0), kv.acquire(0)
        kv.look_ahead([(a, 450)])
        time.sleep(chance.random() * 0.003)
        assert kv.ensure(b, 450) is None, "all five groups belong to b"
        kv.trim(b, 0)
        kv.look_ahead([(b, 450), (a, 450)])
        time.sleep(chance.random() * 0.003)
        assert kv.ensure(a, 450) is None
        kv.check()
        kv.close()


def mapper_needs_no_gil(seconds: float) -> None:
    """The mapper maps while this thread never lets the GIL go: it cannot be inside Python."""
    sys.setswitchinterval(1000.0)
    kv = make("memfd", geometry(max_tokens=400), pool_groups=100)
    slot = kv.acquire(0)
    ticket = kv.look_ahead([(slot, 400)])
    end = time.perf_counter() + 30
    while not ticket.done:  # an attribute: the GIL stays here
        assert time.perf_counter() < end
    assert kv.mapped_tokens(slot) == 400
    kv.close()


def waiting_lets_others_run(seconds: float) -> None:
    """ticket.wait() lets the GIL go: another Python thread counts meanwhile."""
    kv = make("memfd", geometry("per_layer", slots=8, max_tokens=2000), pool_groups=1500)
    slots = [kv.acquire(0) for _ in range(8)]
    counted = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    assert kv.look_ahead([(slot, 2000) for slot in slots]).wait(30)
    assert counted[0] > before
    stop.set()
    thread.join()
    kv.close()


def close_from_two_threads(seconds: float) -> None:
    """Both callers return after everything is gone; others see a closed allocator, not a crash, and nothing broken."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        kv = make("memfd", geometry(max_tokens=400), pool_groups=100, release_after_s=0.0)
        slots = [kv.acquire(0) for _ in range(3)]
        seen: list[Any] = []

        def use(slot: int, kv: Any = kv, seen: list[Any] = seen) -> None:
            try:
                for tokens in range(400):
                    kv.ensure(slot, tokens)
                    kv.look_ahead([(slot, 400)])
            except RuntimeError as error:
                seen.append(str(error))

        def close(kv: Any = kv, seen: list[Any] = seen) -> None:
            kv.close()
            seen.append(kv.stats().physical_bytes)

        def check(kv: Any = kv, seen: list[Any] = seen) -> None:
            try:
                while not kv.closed:
                    kv.check()
            except RuntimeError as error:
                seen.append(f"check: {error}")

        threads = [threading.Thread(target=use, args=(slot,)) for slot in slots]
        threads += [threading.Thread(target=close) for _ in range(2)]
        threads += [threading.Thread(target=check)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen.count(0) == 2 and all(s == 0 or "closed" in s for s in seen)
        kv.check()


SCENES = {
    scene.__name__: scene
    for scene in (
        churn, close_while_busy, release_while_mapping, foreground_beats_look_ahead, mapper_needs_no_gil,
        waiting_lets_others_run, close_from_two_threads, churn_cuda, kernels_in_flight,
    )
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(50, exit=True)
    SCENES[sys.argv[1]](float(sys.argv[2]))
    print("done")
