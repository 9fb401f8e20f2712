"""What mapping costs on this machine: `python -m vattention_ext.measure`. Prints a table, then one JSON line.

Sizes are SmolLM2-135M's (bf16, mega layout, 2 MiB pages). Knows no targets.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable

from .allocator import KvAllocator
from .geometry import KvGeometry

ROUNDS = 200_000
SLOTS = 1000
GROUPS = 64


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def call_costs() -> dict[str, float]:
    """Calls that find their pages mapped, from Python."""
    shape = KvGeometry(30, 3, 64, 2, 2048, SLOTS, 12288)
    with KvAllocator(shape, pool_groups=SLOTS) as kv:
        step = [(slot, 1) for slot in range(SLOTS) if kv.acquire(1) is not None]
        kv.ensure_many(step)
        ensure = kv.ensure

        def many() -> None:
            for _ in range(ROUNDS):
                ensure(7, 1)

        return {
            "ensure_us": seconds(many) / ROUNDS * 1e6,
            "ensure_many_1000_us": min(seconds(lambda: kv.ensure_many(step)) for _ in range(100)) * 1e6,
            "stats_1000_us": min(seconds(kv.stats) for _ in range(20)) * 1e6,
        }


def page_costs() -> dict[str, float]:
    """Driver verbs for a 2 MiB page, and first touches of a group in the foreground and after look-ahead."""
    shape = KvGeometry(30, 3, 64, 2, 8192, 8)
    out: dict[str, float] = {}

    def touch(kv: KvAllocator, slot: int) -> float:
        regions = kv.regions
        size = GROUPS // 2 * shape.page_bytes
        addresses = [region.address + slot * shape.slot_bytes for region in regions]
        return seconds(lambda: [ctypes.memset(address, 1, size) for address in addresses]) / (GROUPS // 2)

    with KvAllocator(shape, pool_groups=GROUPS) as kv:
        tokens = shape.tokens_in(GROUPS // 2)
        cold, ahead = kv.acquire(tokens), kv.acquire(tokens)
        assert isinstance(cold, int) and isinstance(ahead, int)
        out["grow_group_us"] = seconds(lambda: kv.ensure(cold, tokens)) / (GROUPS // 2) * 1e6
        out["first_touch_group_us"] = touch(kv, cold) * 1e6
        out["second_touch_group_us"] = touch(kv, cold) * 1e6
        ticket = kv.look_ahead([(ahead, tokens)])
        out["look_ahead_group_us"] = seconds(ticket.wait) / (GROUPS // 2) * 1e6
        out["touch_after_look_ahead_group_us"] = touch(kv, ahead) * 1e6
        kv.release(cold)
        kv.release(ahead)
        kv.reclaim(0)
        stats = kv.stats()
        pages = 2 * (GROUPS // 2) * shape.pages_per_group  # one call may cover many
        for verb, calls in stats.driver_calls.items():
            if calls and verb not in ("reserve", "unreserve"):
                out[f"{verb}_page_us"] = stats.driver_time_us[verb] / pages
    return out


def main() -> None:
    found = {name: round(value, 3) for name, value in {**call_costs(), **page_costs()}.items()}
    for name, value in found.items():
        print(f"{name:34s} {value:12.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
