"""mapping: what physical memory on demand costs: a page, and the wait of a step, with and without looking ahead.

A page: every verb of the driver over many pages, one after the other. A step: the time that the engine's thread spent
growing slots or waiting for the mapper before it could start, apart for steps that admit somebody (nobody knew of their
prompts a step before), for steps that go on with prompts, and for decodes alone. The price of a first touch (the system
clears what it hands out) is in the step's time, not in its stall.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence

from engine.core.clock import MonotonicClock
from engine.core.executor import Executor
from engine.core.plan import StepPlan, StepResult
from scripts.benching import drive
from scripts.benching.engines import Opened, add_model_flags, opened
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.metrics import quantile
from scripts.benching.options import add_run_flags, add_workload_flags, report_of, workloads_of
from scripts.benching.workloads import Workload
from vattention_ext import KvAllocator, KvGeometry

VERBS = ("create", "map", "allow", "unmap", "destroy")
KINDS = ("admission", "prefill", "decode")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    add_workload_flags(parser, "16x32+128,8x512+4")
    add_run_flags(parser, 1)
    parser.add_argument("--pages", type=int, default=128, help="pages a run of the verbs takes [128]")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure. Returns 0. Raises ValueError for fewer than 2 pages."""
    if args.pages < 2:
        raise ValueError(f"--pages {args.pages} must be at least 2, one of K and one of V")
    workloads = workloads_of(args)
    with opened(args, rest) as engine:
        report = report_of(args, engine)
        geometry = engine.loop.executor.runner.store.geometry  # type: ignore[attr-defined]
        report.records.append(verbs(geometry, engine, args.pages, args.runs))
        for workload in workloads:
            engine.check_fits(workload)
        for workload in workloads:
            for ahead in (True, False):
                report.records += steps(engine, workload, args.runs, ahead=ahead)
    finish(report, args.json)
    return 0


def verbs(geometry: KvGeometry, engine: Opened, pages: int, runs: int) -> Record:
    """Grow one slot, give everything back; microseconds a page by verb. Floor: clearing the page."""
    groups = max(1, min(pages // geometry.pages_per_group, geometry.groups_per_slot))
    found: dict[str, list[float]] = {name: [] for name in ("grow", *VERBS)}
    clock = MonotonicClock()
    for _ in range(runs):
        with KvAllocator(geometry, driver=engine.config.kv_driver, pool_groups=groups) as kv:
            tokens = geometry.tokens_in(groups)
            slot = kv.acquire(tokens)
            assert isinstance(slot, int)
            start_s = clock.now_s()
            refused = kv.ensure(slot, tokens)
            took_s = clock.now_s() - start_s
            if refused is not None:
                raise ValueError(f"{groups} groups of {geometry.group_bytes} bytes were refused ({refused.reason}); "
                                 "use a smaller --pages")
            found["grow"].append(1e6 * took_s / (groups * geometry.pages_per_group))
            kv.release(slot)
            kv.reclaim(0)
            stats = kv.stats()
            for name in VERBS:  # a call may be of many pages
                found[name].append(stats.driver_time_us[name] / (groups * geometry.pages_per_group))
    clear_us = 1e6 * geometry.page_bytes / engine.device.bytes_s
    figures = tuple(
        Figure(name, "us/page", tuple(values), False, clear_us if name == "grow" else None)
        for name, values in found.items()
    )
    return Record(f"page of {geometry.page_bytes >> 10} KiB", figures, engine.config.kv_driver,
                  {"pages": groups * geometry.pages_per_group, "layout": geometry.layout})  # fmt: skip


class StallExecutor:
    """An executor that notes how long each plan's memory held the engine's thread up; everything else passes through.

    stalls_us, step_us: by kind of step. A step lasts from the end of the one before (or its own submission, whichever
    is later) to its own end.
    """

    def __init__(self, inner: Executor, allocator: KvAllocator) -> None:
        self.inner, self.allocator = inner, allocator
        self.stalls_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.step_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._clock = MonotonicClock()
        self._submitted: deque[tuple[str, float]] = deque()
        self._ended_s = 0.0

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        before_us, now_s = self._stalled_us(), self._clock.now_s()
        self.inner.submit(plan)
        kind = ""
        if plan.chunks:
            prompts = any(chunk.length > 1 for chunk in plan.chunks)
            kind = "admission" if plan.admissions else "prefill" if prompts else "decode"
            self.stalls_us[kind].append(self._stalled_us() - before_us)
        self._submitted.append((kind, now_s))

    def wait(self) -> StepResult:
        """See Executor."""
        result = self.inner.wait()
        kind, submitted_s = self._submitted.popleft()
        now_s = self._clock.now_s()
        if kind:
            self.step_us[kind].append(1e6 * (now_s - max(submitted_s, self._ended_s)))
        self._ended_s = now_s
        return result

    def close(self) -> None:
        """See Executor."""
        self.inner.close()

    def _stalled_us(self) -> float:
        """Foreground time spent growing and waiting since the start."""
        stats = self.allocator.stats()
        return stats.grow_us + stats.map_wait_us + stats.fence_wait_us


def steps(engine: Opened, workload: Workload, runs: int, *, ahead: bool) -> list[Record]:
    """The stalls of a workload's steps, a record for each kind of step. ahead=False: nobody maps before a step asks.

    Every run starts with nothing mapped, so that a growth is a growth.
    """
    loop, inner = engine.loop, engine.loop.executor
    store = inner.runner.store  # type: ignore[attr-defined]
    words = "look-ahead on" if ahead else "look-ahead off"
    if not ahead:
        store.look_ahead = lambda plan: None
    watched: list[StallExecutor] = []
    try:
        for number in range(runs):
            store.allocator.reclaim(0)
            watched.append(StallExecutor(inner, store.allocator))
            loop.executor = watched[-1]
            found = drive.run(loop, workload, engine.spec.vocab)
            print(f"{workload.name}, {words}, run {number + 1}: {found.steps} steps", flush=True)
    finally:
        loop.executor = inner
        if not ahead:
            del store.look_ahead
    return [
        record_of(workload, f"{kind}, {words}", [one.stalls_us[kind] for one in watched],
                  [quantile(one.step_us[kind], 0.5) for one in watched])
        for kind in KINDS if all(one.stalls_us[kind] for one in watched)
    ]  # fmt: skip


def record_of(workload: Workload, variant: str, runs: Sequence[Sequence[float]], step_us: Sequence[float]) -> Record:
    """Stalls of the steps of one kind, by run, and what they are of the run's median step of that kind."""
    figures = []
    for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        stalls = tuple(quantile(one, part) for one in runs)
        shares = tuple(100 * stall / step for stall, step in zip(stalls, step_us, strict=True))
        figures.append(Figure(f"stall_{name}", "us", stalls, False))
        figures.append(Figure(f"stall_{name} / step", "%", shares, False))
    figures.append(Figure("step_p50", "us", tuple(step_us), False))
    return Record(workload.name, tuple(figures), variant, {"steps": [len(stalls) for stalls in runs]})
