"""What the allocator costs on a real GPU, for scripts/gpu_allocator.py: verbs, beside running kernels, and by step.

Times are of this thread or of the GPU, as each says. Knows no targets and checks no promise.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable
from typing import Any

from scripts.gpu_allocator_checks import LLAMA, MIB, Bench, Found, acquire, need
from vattention_ext.values import VERBS

AHEAD = 8  # tokens, as engine.kv.slots looks
GROUP_TOKENS = 2 * MIB // (LLAMA["layers"] * LLAMA["kv_heads"] * LLAMA["head_dim"] * LLAMA["element_bytes"])
STREAM_BYTES = 1 << 30


def quantiles(values: list[float], name: str) -> Found:
    """The middle, the highest hundredth and the highest."""
    ordered = sorted(values) or [0.0]
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_{k}": round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) for k, q in at.items()}


def middle(values: list[float]) -> float:
    """The median."""
    return sorted(values)[len(values) // 2]


def measure_verbs(bench: Bench, page_bytes: int) -> Found:
    """Microseconds a page by verb, a group (two pages) grown alone, and one of many grown at once, GPU idle."""
    tokens = page_bytes // 65536
    kv = bench.open(pool_groups=200, page_bytes=page_bytes, max_tokens=100 * tokens)
    one, many = acquire(kv), acquire(kv)
    alone = []
    for group in range(1, 101):
        start = time.perf_counter()
        kv.ensure(one, group * tokens)
        alone.append((time.perf_counter() - start) * 1e6)
    start = time.perf_counter()
    kv.ensure(many, 100 * tokens)
    at_once = (time.perf_counter() - start) * 1e4
    kv.release(one)
    kv.release(many)
    kv.reclaim(0)
    stats = kv.stats()
    kv.close()
    verbs = [verb for verb in VERBS if verb not in ("allow", "unreserve")]
    out = {f"{verb}_us": stats.driver_time_us[verb] / max(1, stats.driver_calls[verb]) for verb in verbs}
    out["allow_page_us"] = stats.driver_time_us["allow"] / 400
    out.update(quantiles(alone, "grow_group_us"), grow_group_of_100_us=at_once)
    return {name: round(value, 2) for name, value in out.items()}


class Pages:
    """Pages handled through libcuda by hand, one verb at a time."""

    def __init__(self, bench: Bench, count: int) -> None:
        self.cuda, self.count, self.bytes = bench.cuda, count, ctypes.c_size_t(2 * MIB)
        # CUmemAllocationProp: pinned, not exported, on this device; CUmemAccessDesc: this device, read and write
        self.properties = (ctypes.c_int * 8)(1, 0, 1, bench.device)
        self.access = (ctypes.c_int * 3)(1, bench.device, 3)
        self.base, self.handles = ctypes.c_uint64(), [ctypes.c_uint64() for _ in range(count)]
        self.cuda("cuMemAddressReserve", ctypes.byref(self.base), ctypes.c_size_t(2 * MIB * count), ctypes.c_size_t(0),
                  ctypes.c_uint64(0), ctypes.c_ulonglong(0))  # fmt: skip

    def at(self, page: int) -> ctypes.c_uint64:
        """Its address."""
        return ctypes.c_uint64(self.base.value + page * 2 * MIB)

    def create(self, page: int) -> None:
        """Memory."""
        self.cuda("cuMemCreate", ctypes.byref(self.handles[page]), self.bytes, self.properties, ctypes.c_ulonglong(0))

    def map(self, page: int) -> None:
        """Under its address."""
        self.cuda("cuMemMap", self.at(page), self.bytes, ctypes.c_size_t(0), self.handles[page], ctypes.c_ulonglong(0))

    def allow(self, page: int) -> None:
        """Readable and writable."""
        self.cuda("cuMemSetAccess", self.at(page), self.bytes, self.access, ctypes.c_size_t(1))

    def unmap(self, page: int) -> None:
        """Gone from its address."""
        self.cuda("cuMemUnmap", self.at(page), self.bytes)

    def destroy(self, page: int) -> None:
        """Back to the GPU."""
        self.cuda("cuMemRelease", self.handles[page])

    def close(self) -> None:
        """Gives the addresses back."""
        self.cuda("cuMemAddressFree", self.base, ctypes.c_size_t(2 * MIB * self.count))


def measure_beside(bench: Bench, pages: int, rounds: int) -> dict[str, Found]:
    """Each verb back to back while kernels run that do not touch its pages: microseconds a call (middle, worst), and
    how much slower the kernels are while it goes on. `matrix`: products; `stream`: sums over 1 GiB."""
    torch = bench.torch
    source = torch.ones(STREAM_BYTES // 4, device="cuda")
    out = torch.empty((), device="cuda")
    torch.sum(source, dim=0, out=out)
    loads: dict[str, Callable[[], object]] = {
        "matrix": lambda: bench.load.products(1), "stream": lambda: torch.sum(source, dim=0, out=out)}  # fmt: skip
    found: dict[str, Found] = {}
    for name, load in loads.items():
        one_ms = bench.load.timed_ms(lambda: None, 20, load) / 20
        calls: dict[str, list[float]] = {}
        slower: dict[str, list[float]] = {}
        for _ in range(rounds):
            mine = Pages(bench, pages)
            for verb in ("create", "map", "allow", "unmap", "destroy"):
                spent: list[float] = []

                def work(verb: str = verb, mine: Pages = mine, spent: list[float] = spent) -> None:
                    call = getattr(mine, verb)
                    for page in range(pages):
                        start = time.perf_counter()
                        call(page)
                        spent.append((time.perf_counter() - start) * 1e6)

                # as many kernels as last longer than the calls
                count = max(10, int({"create": 30, "map": 5, "allow": 45, "unmap": 35, "destroy": 30}[verb]
                                    * pages / 1e3 / one_ms) + 1)  # fmt: skip
                alone_ms = bench.load.timed_ms(lambda: None, count, load)
                beside_ms = bench.load.timed_ms(work, count, load)
                calls.setdefault(verb, []).extend(spent)
                slower.setdefault(verb, []).append(100 * (beside_ms - alone_ms) / min(sum(spent) / 1e3, beside_ms))
            mine.close()
        for verb, spent in calls.items():
            found[f"{name}_{verb}"] = {**quantiles(spent, "us"), "slower_percent": round(middle(slower[verb]), 2)}
    return found


def measure_launches(bench: Bench, groups: int) -> Found:
    """Microseconds that launching a kernel takes this thread, with the mapper idle and with it busy."""
    kv = bench.open(pool_groups=groups, max_tokens=groups * GROUP_TOKENS)
    slot = acquire(kv)
    found: Found = {}
    for name in ("alone", "beside"):
        bench.torch.cuda.synchronize()
        ticket = kv.look_ahead([(slot, groups * GROUP_TOKENS)]) if name == "beside" else None
        spent = []
        for _ in range(200):
            start = time.perf_counter()
            bench.load.products(1)
            spent.append((time.perf_counter() - start) * 1e6)
        found.update(quantiles(spent, f"launch_us_{name}"))
        if ticket is not None:
            found["mapper_still_busy"] = float(not ticket.done)
            ticket.wait(20)
    kv.close()
    return found


def measure_steps(bench: Bench, steps: int, sequences: int, *, ahead: int, lockstep: bool = False,
                  arrivals: bool = False) -> Found:  # fmt: skip
    """Decodes at the engine's pace, two steps in flight: each step asks for its tokens, launches about 5 ms of products
    and lets the mapper look `ahead` tokens further (0: nobody grows). lockstep: all cross into a new page in the same
    step. arrivals: sequences end and others come, with prompts of 256-1,024.

    stall: what the allocator counts; calls: all its calls on this thread, by the clock."""
    chance = random.Random(1)
    sequences = max(1, min(sequences, bench.cuda.free_bytes() // (256 * MIB)))
    groups = sequences * 72
    kv = bench.open(slots=sequences + 16, pool_groups=groups, stock_groups=64, max_tokens=4096)
    lengths: dict[int, int] = {}

    def arrive(tokens: int) -> None:
        lengths[acquire(kv, tokens)] = tokens

    while len(lengths) < sequences:
        arrive(256 if lockstep else chance.randint(200, 1500))
    need(kv.ensure_many(list(lengths.items())) == [], "refused")
    kv.fence(bench.load.stream)
    bench.load.catch_up()
    first, calls, came = kv.stats(), [], []
    start = time.perf_counter()
    for _ in range(steps):
        wanted = list(lengths.items())
        began = time.perf_counter()
        need(kv.ensure_many(wanted) == [], "refused")
        mid = time.perf_counter()
        bench.load.step()
        launched = time.perf_counter()
        kv.fence(bench.load.stream)
        came.append(0)
        for slot in [slot for slot in lengths if arrivals and chance.random() < 0.004]:
            kv.release(slot)
            del lengths[slot]
            arrive(chance.randint(256, 1024))
            came[-1] += 1
        if ahead:
            lengths = {slot: tokens + 1 for slot, tokens in lengths.items()}
            kv.look_ahead([(slot, min(4096, tokens + ahead - 1)) for slot, tokens in lengths.items()])
        calls.append((mid - began + time.perf_counter() - launched) * 1e6)
        bench.load.catch_up()
    step_us = (time.perf_counter() - start) / steps * 1e6
    stalls = kv.stalls_us()[1:]
    last = kv.stats()
    kv.close()
    found: Found = {"step_us": round(step_us, 1), **quantiles(stalls[10:], "stall_us"),
                    **quantiles(calls[10:], "calls_us")}  # fmt: skip
    for name in ("map_wait_us", "grow_us", "fence_wait_us", "look_ahead_mapped", "look_ahead_given_up"):
        found[name] = round(getattr(last, name) - getattr(first, name), 1)
    found["stall_p99_percent"] = round(found["stall_us_p99"] / step_us * 100, 3)
    worst = sorted(range(10, len(stalls)), key=lambda i: -stalls[i])[:3]
    found["worst"] = [{"step": i, "us": round(stalls[i], 1), "arrivals_before": came[i - 1]} for i in worst]
    return found


def measure(bench: Bench, steps: int = 250) -> dict[str, Found]:
    """All of it, by name."""
    found: dict[str, Found] = {f"verbs_{size}_mib": measure_verbs(bench, size * MIB) for size in (2, 16)}
    if bench.torch is not None:
        found.update(measure_beside(bench, 400, 3))
        found["launches"] = measure_launches(bench, 400)
    decode: dict[str, dict[str, Any]] = {
        "still_64": {"sequences": 64, "ahead": 0},
        "decode_64": {"sequences": 64, "ahead": AHEAD},
        "decode_64_next_only": {"sequences": 64, "ahead": 1},
        "lockstep_128": {"sequences": 128, "ahead": AHEAD, "lockstep": True},
        "lockstep_128_next_only": {"sequences": 128, "ahead": 1, "lockstep": True},
        "arrivals_64": {"sequences": 64, "ahead": AHEAD, "arrivals": True},
    }
    for name, settings in decode.items():
        found[name] = measure_steps(bench, steps, **settings)
    return found
