"""Where the steps of a workload spend their time on a GPU: `python -m scripts.gpu_steps --shape llama3-8b`.

Runs a workload of scripts.bench and notes, for each step, what the host did (plan, memory, launch, wait, commit) and
how long the GPU was at it; prints means by kind of step. With --kernels A:B the steps A to B run under PyTorch's
profiler: the part of the time in which no kernel runs, and the kernels that take the rest. Those steps are left out of
the means.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from engine.core.loop import EngineLoop
from engine.core.plan import StepPlan
from engine.exec.local import LocalExecutor
from engine.runner.runner import Launched, Runner
from scripts.benching import drive
from scripts.benching.engines import Opened, add_model_flags, opened
from scripts.benching.options import add_workload_flags, workloads_of
from scripts.benching.workloads import warm_up

HOST = ("plan", "memory", "launch", "ahead", "wait", "commit")
COLUMNS = ("tokens", "prompts", "decodes", "wall", "period", "gpu", *HOST)


class Watch:
    """Times of every step of one engine. GPU spans are from the first launch of a step to its last kernel's end."""

    def __init__(self, engine: EngineLoop) -> None:
        assert isinstance(engine.executor, LocalExecutor)
        self.steps: list[dict[str, float]] = []
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._now: dict[str, float] = defaultdict(float)
        runner = engine.executor.runner
        self._time(engine.scheduler, "plan", "plan")
        self._time(engine.scheduler, "commit", "commit")
        self._time(runner.store, "apply", "memory")
        self._time(runner.store, "look_ahead", "ahead")
        self._time(runner, "_forward", "launch")
        self._time(runner, "collect", "wait")
        self._watch(runner)

    def _time(self, owner: Any, name: str, key: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        @wraps(inner)
        def timed(*args: Any) -> Any:
            start = perf_counter()
            try:
                return inner(*args)
            finally:
                self._now[key] += 1e3 * (perf_counter() - start)

        setattr(owner, name, timed)

    def _watch(self, runner: Runner) -> None:
        inner = runner.launch

        def launch(plan: StepPlan) -> Launched:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            done = inner(plan)
            ended.record()
            self.spans.append((began, ended))
            prompts = [chunk for chunk in plan.chunks if chunk.length > 1]
            self.steps.append({
                "tokens": sum(chunk.length for chunk in plan.chunks), "prompts": len(prompts),
                "decodes": len(plan.chunks) - len(prompts), "at": perf_counter(), **self._now,
            })  # fmt: skip
            self._now.clear()
            return done

        runner.launch = launch  # type: ignore[method-assign]

    def close(self) -> None:
        """Turn events into milliseconds: gpu of a step, gap = what the GPU had nothing to do before it."""
        torch.cuda.synchronize()
        for index, (step, (began, ended)) in enumerate(zip(self.steps, self.spans, strict=True)):
            step["gpu"] = began.elapsed_time(ended)
            if index:
                step["wall"] = 1e3 * (step["at"] - self.steps[index - 1]["at"])
                step["period"] = self.spans[index - 1][1].elapsed_time(ended)


def kind(step: dict[str, float]) -> str:
    """Steps that should cost about the same."""
    rows = 1 << max(0, int(step["tokens"]) - 1).bit_length()
    return f"{'decodes' if not step['prompts'] else 'hybrid'} to {rows} tokens"


def table(steps: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Means by kind, the most time first."""
    kinds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for step in steps[1:]:
        kinds[kind(step)].append(step)
    found = []
    for name, mine in kinds.items():
        row: dict[str, Any] = {"kind": name, "steps": len(mine)}
        for key in COLUMNS:
            row[key] = round(mean(step.get(key, 0.0) for step in mine), 3)
        found.append(row)
    return sorted(found, key=lambda row: -row["wall"] * row["steps"])


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line a kind; times in milliseconds."""
    print(f"{'kind':28}{'steps':>6}" + "".join(f"{key:>9}" for key in COLUMNS))
    for row in rows:
        print(f"{row['kind']:28}{row['steps']:6}" + "".join(f"{row[key]:9.2f}" for key in COLUMNS))


def kernels_of(seen: Any, steps: int) -> dict[str, Any]:
    """Per cent without a kernel, and milliseconds and calls a step of the kernels that took most."""
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in seen.events()
                    if e.device_type == torch.autograd.DeviceType.CUDA)  # fmt: skip
    busy, reached = 0.0, events[0][0]
    share: dict[str, tuple[float, int]] = {}
    for begin, end, name in events:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        total, calls = share.get(name, (0.0, 0))
        share[name] = (total + end - begin, calls + 1)
    span = reached - events[0][0]
    top = sorted(share.items(), key=lambda item: -item[1][0])[:18]
    return {
        "idle_percent": round(100 * (1 - busy / span), 2), "ms_a_step": round(span / steps / 1e3, 3),
        "kernels": {name[:70]: [round(us / steps / 1e3, 3), round(n / steps, 1)] for name, (us, n) in top},
    }  # fmt: skip


def show_kernels(kernels: dict[str, list[float]]) -> None:
    """A line a kernel: milliseconds and calls a step."""
    for name, (ms, calls) in kernels.items():
        print(f"  {ms:8.3f} ms {calls:7.1f} a step  {name}", flush=True)


class Profiled:
    """Wraps engine.step: steps first..last run under the profiler."""

    def __init__(self, engine: EngineLoop, first: int, last: int) -> None:
        self.first, self.last, self.count = first, last, 0
        self.found: dict[str, Any] = {}
        self._inner = engine.step
        self._profile: Any = None
        engine.step = self.step  # type: ignore[method-assign]

    def step(self) -> Any:
        """As the engine's."""
        from torch.profiler import ProfilerActivity, profile

        if self.count == self.first:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
        result = self._inner()
        if self.count == self.last:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self.found = kernels_of(self._profile, self.last - self.first + 1)
        self.count += 1
        return result


def measure(engine: Opened, workload: Any, window: tuple[int, int] | None, host: bool) -> dict[str, Any]:
    """One run, watched."""
    loop = engine.loop
    drive.run(loop, warm_up(workload), engine.spec.vocab, seed=1)
    watch = Watch(loop)
    profiled = Profiled(loop, *window) if window else None
    if host:
        import cProfile
        import pstats

        calls = cProfile.Profile()
        calls.enable()
        run = drive.run(loop, workload, engine.spec.vocab)
        calls.disable()
        pstats.Stats(calls).sort_stats("tottime").print_stats(25)
    else:
        run = drive.run(loop, workload, engine.spec.vocab)
    watch.close()
    steps = watch.steps
    if window:
        steps = steps[: window[0]] + steps[window[1] + 3 :]
    rows = table(steps)
    slowest = sorted(steps[1:], key=lambda step: -step.get("wall", 0.0))[:8]
    print(f"{workload.name}: {run.seconds:.2f} s, {workload.output_tokens / run.seconds:,.0f} output tok/s, "
          f"{run.steps} steps", flush=True)  # fmt: skip
    show(rows)
    print("slowest:")
    show([{"kind": kind(step), "steps": 1, **{key: step.get(key, 0.0) for key in COLUMNS}} for step in slowest])
    found: dict[str, Any] = {"workload": workload.name, "seconds": run.seconds, "steps": rows}
    if profiled is not None and profiled.found:
        found["kernels"] = profiled.found
        print(f"steps {window}: {profiled.found['ms_a_step']} ms a step, no kernel runs in "
              f"{profiled.found['idle_percent']} % of it")  # fmt: skip
        show_kernels(profiled.found["kernels"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_steps", description=__doc__)
    add_model_flags(parser)
    add_workload_flags(parser, "offline_chat", online=True)
    parser.add_argument("--kernels", default="", metavar="A:B", help="profile the kernels of steps A to B")
    parser.add_argument("--host", action="store_true", help="also profile the host's functions (slower)")
    parser.add_argument("--json", type=Path, default=None)
    args, rest = parser.parse_known_args(arguments)
    window = None
    if args.kernels:
        first, _, last = args.kernels.partition(":")
        window = (int(first), int(last))
    with opened(args, rest) as engine:
        found = [measure(engine, workload, window, args.host) for workload in workloads_of(args)[:1]]
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
