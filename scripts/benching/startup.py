"""startup: seconds from the command to the first 200 of /ready, the model present; a warm-up, then repeats.

The floor is what no server can leave out: starting an interpreter that imports torch, and reading the weights once
(random ones are not read).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.core.clock import MonotonicClock
from scripts.benching.engines import add_model_flags, model_flags
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.options import add_run_flags, report_of
from scripts.benching.server import Server

READ_BYTES = 16 << 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    add_run_flags(parser, 5)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure. Returns 0."""
    report = report_of(args)
    seconds: list[float] = []
    first: dict[str, float] = {}
    with model_flags(args) as (name, flags):
        floor = {"import_torch_s": import_s("torch"), "read_weights_s": read_s(Path(flags[1]))}
        for number in range(args.runs + 1):
            with Server([*flags, *rest]) as server:
                took_s = server.ready_s
            print(f"{f'run {number}' if number else 'warm-up'}: ready after {took_s:.2f} s", flush=True)
            if number:
                seconds.append(took_s)
            else:  # without a kernel cache on a machine where nothing has run yet
                first = {"warm_up_s": took_s}
    report.environment |= {"model": name, "flags": list(rest)}
    figure = Figure("ready", "s", tuple(seconds), False, sum(floor.values()))
    report.records.append(Record("start to ready", (figure,), details=floor | first))
    finish(report, args.json)
    return 0


def import_s(module: str) -> float:
    """An interpreter that imports a module and ends; the second of two, whose files are in memory."""
    clock, took_s = MonotonicClock(), 0.0
    for _ in range(2):
        start_s = clock.now_s()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        took_s = clock.now_s() - start_s
    return took_s


def read_s(folder: Path) -> float:
    """Every safetensors file of a folder, read once more after it was read."""
    clock, took_s = MonotonicClock(), 0.0
    buffer = bytearray(READ_BYTES)
    for _ in range(2):
        start_s = clock.now_s()
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        took_s = clock.now_s() - start_s
    return took_s
