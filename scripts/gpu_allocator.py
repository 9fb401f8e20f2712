"""Does the allocator keep its promises on a real GPU, and what does it cost there? `python -m scripts.gpu_allocator`.

Prints a line per check, one per race without its fence, costs and, last, one JSON line; status 1 if a check failed, or
if a race without its fence did not; under a minute.
    --sanitize       the checks that launch kernels, inside compute-sanitizer, or a line why that cannot run here
    --libcuda PATH   another library than the system's; the tests name their fake
Torch is used where it is installed: without it the only kernel is the race's own. Knows no targets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benching.environment import heading
from scripts.gpu_allocator_checks import LAUNCHING, PLAIN, Bench, Found, child
from scripts.gpu_allocator_costs import measure
from scripts.gpu_race import WAYS, check_race, control


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


def run_controls(bench: Bench) -> tuple[Found, int]:
    """Every race without its fence, each in a process of its own; how many went well, and so prove nothing."""
    found: Found = {}
    harmless = 0
    for way in WAYS:
        status, said = child(bench, "control", limit_s=15, options=("--way", way))
        answers = [line for line in said.splitlines() if line.startswith('{"in_flight"')]
        found[way] = json.loads(answers[-1]) if answers else {"fails": False, "status": status, "said": said[-300:]}
        harmless += not found[way]["fails"]
        what = found[way].get("error") or f"{found[way].get('wrong_words')} wrong words"
        print(f"{'ok  ' if found[way]['fails'] else 'FAIL'} {'without its fence: ' + way:32s} {what}  {found[way]}")
    if harmless == 0:
        print("without its fence every race fails")
    return found, harmless


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


def finish(report: Found, path: Path | None) -> None:
    """The last line, and the same into a file."""
    print(json.dumps(report))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--libcuda")
    parser.add_argument("--sanitize", action="store_true")
    modes = ("all", "launching", "control", "free")
    parser.add_argument("--mode", choices=modes, default="all", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=tuple(WAYS), default="steal", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where the JSON goes, beside the last line")
    arguments = parser.parse_args()
    plain = arguments.sanitize or arguments.mode in ("free", "control")
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
        head = heading("gpu_allocator", "allocator: its kernels inside compute-sanitizer", None)
        sanitized = sanitize(bench)
        print(sanitized.get("said", sanitized.get("why")))
        finish({**head, "gpu": bench.cuda.name, "cuda": bench.cuda.version, "sanitizer": sanitized}, arguments.json)
        return int(sanitized["ran"] and not sanitized["clean"])
    if arguments.mode == "control":
        print(json.dumps(control(bench, arguments.way)), flush=True)
        os._exit(0)  # its context is gone: there is nothing left to close
    if arguments.mode == "launching" and torch is None:
        print("torch is not installed: there are no kernels to check", file=sys.stderr)
        return 2
    # a child's parent says where it runs; nothing but the checks runs inside the sanitizer
    head = heading("gpu_allocator", "allocator: checks, races, costs", None) if arguments.mode == "all" else {}
    launching = LAUNCHING if torch is not None else ()
    checks, failed = run_checks(bench, (check_race, *launching) if arguments.mode == "launching"
                                else (*PLAIN, check_race, *launching))  # fmt: skip
    report: Found = {
        **head, "gpu": bench.cuda.name, "cuda": bench.cuda.version, "torch": getattr(torch, "__version__", None),
        "checks": checks, "failed": failed, "sanitizer": sanitizer(),
    }  # fmt: skip
    if arguments.mode == "all":
        report["controls"], harmless = run_controls(bench)
        report["failed"] += harmless
        report["costs"] = measure(bench)
        for name, values in report["costs"].items():
            print(f"{name:24s} " + "  ".join(f"{key}={value}" for key, value in values.items()))
    finish(report, arguments.json)
    return int(report["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
