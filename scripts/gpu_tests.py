"""The GPU tests, file beside file, and one count: `python -m scripts.gpu_tests [--jobs N] [--shard i/n] [FILE ...]`.

Much of a GPU test's time is compiling kernels and starting engines, which is the host's; so files run in processes side
by side, the first listed first. Tests marked `alone`, which fill the GPU's memory or measure it, come last and have the
GPU for themselves. What pytest's own arguments are stands behind `--`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from scripts.benching.environment import heading

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "tests" / "manifests" / "gpu.txt"
COUNTS = re.compile(r"^gpu tests, shard \S+: (.+)$", re.MULTILINE)  # of tests/gpu/conftest.py
COUNT = re.compile(r"(\d+) ([a-z ]+)")
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--timeout", "240", "--durations", "5")
NO_TESTS = 5  # pytest's exit status when a shard or an expression leaves none of a file
LEAST_CORES = 4  # of a process: its kernels are compiled by several
MOST_JOBS = 4


def count_of(output: str, status: int) -> dict[str, int]:
    """What a pytest process counted; a process that ended without counting is one error."""
    lines = COUNTS.findall(output)
    if not lines:
        return {} if status == NO_TESTS else {"error": 1}
    return {name: int(count) for count, name in COUNT.findall(lines[-1])}


def run_one(name: str, command: Sequence[str]) -> dict[str, int]:
    """Run a process to its end and print what it said, whole. Returns its counts."""
    began = perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", check=False)  # fmt: skip
    print(f"== {name}: {perf_counter() - began:.0f} s\n{done.stdout}", end="", flush=True)
    return count_of(done.stdout, done.returncode)


def total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums by verdict."""
    names = ("passed", "failed", "error", "skipped", "of them for want of time")
    return {name: sum(count.get(name, 0) for count in counts) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a test failed or a process was lost, or when there was no test at all."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_tests", description=__doc__)
    jobs = max(1, min(MOST_JOBS, (os.cpu_count() or 1) // LEAST_CORES))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes side by side [here {jobs}]")
    parser.add_argument("--shard", default="1/1", help="i/n: run part i of n of every file")
    parser.add_argument("--budget-s", type=float, default=450.0, help="no test starts after so many seconds [450]")
    parser.add_argument("--json", type=Path, default=None, help="also write the counts, by file, here")
    parser.add_argument("files", nargs="*", help="test files [those of tests/manifests/gpu.txt]")
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    asked, more = parser.parse_args(given[:split]), given[split + 1 :]
    lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    files: list[str] = asked.files or [line for line in lines if line and not line.startswith("#")]
    began = perf_counter()

    def command(which: str, *chosen: str) -> list[str]:
        left = asked.budget_s - (perf_counter() - began)
        return [
            sys.executable,
            *PYTEST,
            "--shard",
            asked.shard,
            "--budget-s",
            f"{left:.0f}",
            "-m",
            which,
            *chosen,
            *more,
        ]

    with ThreadPoolExecutor(max(1, asked.jobs)) as pool:
        counts = list(pool.map(lambda file: run_one(file, command("not alone", file)), files))
    counts.append(run_one("alone", command("alone", *files)))
    found = total(counts)
    said, took_s = ", ".join(f"{count} {name}" for name, count in found.items()), perf_counter() - began
    if asked.json:
        head = heading("gpu_tests", f"gpu tests, shard {asked.shard}", arguments)
        by_file = dict(zip([*files, "alone"], counts, strict=True))
        told = {**head, "seconds": round(took_s, 1), **found, "files": by_file}
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"gpu tests, shard {asked.shard}, {took_s:.0f} s: {said}")
    return int(found["failed"] + found["error"] > 0 or not any(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
