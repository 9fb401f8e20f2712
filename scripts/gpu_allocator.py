"""Does the allocator keep its promises on a real GPU, and what does it cost there? `python -m scripts.gpu_allocator`.

Prints a line per check, a table of costs and, last, one JSON line; status 1 if a check failed; under a minute.
    --sanitize       the checks that launch kernels, inside compute-sanitizer, or a line why that cannot run here
    --libcuda PATH   another library than the system's; the tests name their fake
Torch is used where it is installed: without it there are no kernels, hence neither races nor load. Knows no targets.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.gpu_allocator_checks import LAUNCHING, MIB, PLAIN, Bench, Found, acquire, check_race, child, need
from vattention_ext.values import VERBS


def run_checks(bench: Bench, checks: tuple[Callable[[Bench], Found], ...]) -> tuple[Found, int]:
    """Results by name, and how many failed."""
    found: Found = {}
    failed = 0
    for check in checks:
        name = check.__name__.removeprefix("check_")
        start = time.perf_counter()
        try:
            found[name] = {"ok": True, **check(bench)}
        except RuntimeError as error:
            found[name] = {"ok": False, "why": str(error)}
            failed += 1
        facts = " ".join(f"{key}={value}" for key, value in found[name].items() if key != "ok")
        print(f"{'ok  ' if found[name]['ok'] else 'FAIL'} {name:24s} {time.perf_counter() - start:6.2f} s  {facts}")
    return found, failed


def quantiles(values: list[float], name: str) -> Found:
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_{k}": round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) for k, q in at.items()}


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


def measure_under_load(bench: Bench) -> Found:
    """300 groups mapped by the mapper, then unmapped here, while products run that do not touch them: time a page, and
    how much longer the products take while mapping goes on."""
    groups, products = 300, 150
    alone_ms = min(bench.load.timed_ms(lambda: None, products) for _ in range(3))
    kv = bench.open(pool_groups=groups, max_tokens=groups * 32)
    slot = acquire(kv)
    times: dict[str, list[float]] = {"map": [], "unmap": [], "map_beside": [], "unmap_beside": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        def work() -> None:
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) / groups / 2 * 1e6)

        times[f"{name}_beside"].append(bench.load.timed_ms(work, products))

    for _ in range(3):
        timed("map", lambda: kv.look_ahead([(slot, groups * 32)]).wait(20))
        timed("unmap", lambda: kv.trim(slot, 0))
    kv.close()
    out = {f"{name}_page_us": round(min(times[name]), 2) for name in ("map", "unmap")}
    out["products_alone_ms"] = round(alone_ms, 2)
    for name in ("map", "unmap"):
        beside_ms = sorted(times[f"{name}_beside"])[1]
        out[f"products_slower_by_{name}_percent"] = round((beside_ms / alone_ms - 1) * 100, 2)
    return out


def measure_steps(bench: Bench, steps: int) -> Found:
    """Decode of 64 sequences (fewer on a small GPU) with arrivals, prompts of 256-1,024, and ends, one step ahead:
    foreground wait by step."""
    chance = random.Random(1)
    sequences = max(1, min(64, bench.cuda.free_bytes() // (512 * MIB)))
    kv = bench.open(slots=80, pool_groups=sequences * 72, stock_groups=16, max_tokens=4096)
    lengths: dict[int, int] = {}

    def arrive(tokens: int) -> None:
        lengths[acquire(kv, tokens)] = tokens

    while len(lengths) < sequences:
        arrive(chance.randint(200, 1500))
    kv.ensure_many(list(lengths.items()))
    kv.fence(bench.load.stream)
    start = time.perf_counter()
    for _ in range(steps):
        need(kv.ensure_many(list(lengths.items())) == [], "refused")
        bench.load.step()
        kv.fence(bench.load.stream)
        for slot in [slot for slot in lengths if chance.random() < 0.004]:
            kv.release(slot)
            del lengths[slot]
            arrive(chance.randint(256, 1024))
        lengths = {slot: tokens + 1 for slot, tokens in lengths.items()}
        kv.look_ahead(list(lengths.items()))
        bench.load.catch_up()
    step_us = (time.perf_counter() - start) / steps * 1e6
    stalls = kv.stalls_us()[11:]
    stats = kv.stats()
    kv.close()
    found = {"step_us": round(step_us, 1), **quantiles(stalls, "stall_us")}
    found["look_ahead_groups"] = stats.look_ahead_mapped
    return {**found, "stall_p99_percent": round(found["stall_us_p99"] / step_us * 100, 3)}


def measure(bench: Bench) -> Found:
    found: Found = {f"verbs_{size}_mib": measure_verbs(bench, size * MIB) for size in (2, 16)}
    if bench.torch is not None:
        found["under_load"] = measure_under_load(bench)
    found["steps"] = measure_steps(bench, 300)
    for name, values in found.items():
        for key, value in values.items():
            print(f"{name:16s} {key:26s} {value:12.2f}")
    return found


def sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((place for place in places if place and Path(place).exists()), None)


def sanitize(bench: Bench) -> Found:
    """Runs the launching checks inside compute-sanitizer's memcheck, where there is one."""
    tool = sanitizer()
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    status, said = child(bench, "launching", (tool, "--tool", "memcheck", "--error-exitcode", "9"), 100)
    clean = "ERROR SUMMARY: 0 errors" in said
    return {"ran": "ERROR SUMMARY" in said, "clean": clean and status == 0, "status": status, "said": said[-600:]}


def import_torch(libcuda: str | None) -> Any:
    """torch with a GPU, or None."""
    if libcuda:
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--libcuda")
    parser.add_argument("--sanitize", action="store_true")
    modes = ("all", "launching", "unfenced", "free")
    parser.add_argument("--mode", choices=modes, default="all", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    plain = arguments.sanitize or arguments.mode == "free"
    torch = None if plain else import_torch(arguments.libcuda)
    if torch is not None:
        torch.cuda.set_device(arguments.device)
    try:
        bench = Bench(arguments.libcuda, arguments.device, torch)
    except (OSError, RuntimeError) as error:
        print(f"no GPU to try this on: {error}", file=sys.stderr)
        return 2
    if arguments.mode == "free":
        print(bench.cuda.free_bytes())
        return 0
    if arguments.sanitize:
        sanitized = sanitize(bench)
        print(sanitized.get("said", sanitized.get("why")))
        print(json.dumps({"sanitizer": sanitized}))
        return int(sanitized["ran"] and not sanitized["clean"])
    if arguments.mode == "unfenced":
        check_race(bench, fenced=False)
        return 0
    if arguments.mode == "launching" and torch is None:
        print("torch is not installed: there are no kernels to check", file=sys.stderr)
        return 2
    launching = LAUNCHING if torch is not None else ()
    checks, failed = run_checks(bench, launching if arguments.mode == "launching" else (*PLAIN, *launching))
    report: Found = {"gpu": bench.cuda.name, "cuda": bench.cuda.version, "torch": getattr(torch, "__version__", None),
              "checks": checks, "failed": failed, "sanitizer": sanitizer()}  # fmt: skip
    if arguments.mode == "all":
        report["costs"] = measure(bench)
        if torch is not None:
            # The race must be one: without its fence the same kernel faults, which ends that process' context.
            status, said = child(bench, "unfenced")
            report["unfenced"] = {"faults": status != 0, "said": said.splitlines()[-1:]}
            print(f"without its fence the race {'faults' if status else 'passes: it proves nothing here'}")
    print(json.dumps(report))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
