"""Flags that several benchmarks share, and the record of where they ran."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from scripts.benching.engines import Opened, settings_of
from scripts.benching.environment import environment
from scripts.benching.figures import Report
from scripts.benching.workloads import NAMES, Workload, find


def add_run_flags(parser: argparse.ArgumentParser, runs: int) -> None:
    """--runs and --json."""
    parser.add_argument("--runs", type=int, default=runs, help=f"repeats after the warm-up [{runs}]")
    parser.add_argument("--json", type=Path, default=None, help="also write the report here")


def add_workload_flags(parser: argparse.ArgumentParser, default: str, *, online: bool = False) -> None:
    """--workload and how to cut it down; an online one's rate and length."""
    parser.add_argument("--workload", default=default, help=f"{', '.join(NAMES)}; several with commas [{default}]")
    parser.add_argument("--requests", type=int, default=0, help="only the first N requests [all]")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths, for slow machines [1]")
    if online:
        parser.add_argument("--rate", type=float, default=8.0, help="online_mixed: requests a second [8]")
        parser.add_argument("--seconds", type=float, default=20.0, help="online_mixed: length of the arrivals [20]")


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """What --workload names. Raises ValueError."""
    if args.requests < 0:
        raise ValueError(f"--requests {args.requests} is negative; 0 is all of them")
    online = {name: getattr(args, name) for name in ("rate", "seconds") if hasattr(args, name)}
    return [find(name, requests=args.requests, shrink=args.shrink, **online)
            for name in split_names(args.workload)]  # fmt: skip


def split_names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def report_of(args: argparse.Namespace, engine: Opened | None = None) -> Report:
    """An empty report of this command, with the engine's settings and ceilings where it has one."""
    where = environment("bench", [args.command, *args.argv])
    if engine is None:
        return Report(args.command, where, {})
    where |= {"model": engine.model, "settings": settings_of(engine.config), "engine_ready_s": engine.ready_s}
    return Report(args.command, where, dataclasses.asdict(engine.device))
