"""How much Python does a step cost? plan() + commit() over many running sequences, every one of them growing.

    python -m scripts.bench_step [--running 1000] [--waiting 100] [--steps 2000] [--policy sarathi] [--group-tokens 16]

Timed: Scheduler.plan and Scheduler.commit, garbage collection included. Not timed: the executor's work, which here
is making the StepResult. Reported is the CPU time of this thread, which is what a step costs on one core, and the
wall time, which on a busy machine also holds the time that other processes had the core.
Prompts have different lengths, so that in every step about running / group_tokens sequences cross into a new page
group; the waiting ones find no slot. Measured twice: with Python's own collector settings, and with those that the
engine process runs under (engine/core/heap.py); the limit is for the second. Prints p50, p99 and max, then one line
of JSON.
It knows no model; it measures one core.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sys
import time

from engine.core.heap import settle_heap
from engine.core.ledger import ADMISSION_RULES, KvLedger
from engine.core.plan import SampledToken, StepPlan, StepResult
from engine.core.policies import make_policy
from engine.core.request import Request, SamplingParams
from engine.core.scheduler import Scheduler

LIMIT_MS = 2.0  # p99 of the default setting
MAX_MODEL_LEN = 1 << 20


def build(options: argparse.Namespace) -> Scheduler:
    """A scheduler whose running sequences have all finished their prompts and can grow for the whole run."""
    group_tokens = options.group_tokens
    rng = random.Random(options.seed)
    prompts = [rng.randrange(16, 16 + 8 * group_tokens) for _ in range(options.running)]
    need = sum(-(-(tokens + 2 * options.steps + 64) // group_tokens) for tokens in prompts)
    ledger = KvLedger(
        need + need // 50 + 1, lambda tokens: -(-tokens // group_tokens), ADMISSION_RULES[options.admission]
    )
    # a budget below `running` would stop admissions before all of them run
    chunk_tokens = 2 * options.running + 512 if options.policy in ("sarathi", "simple_chunking") else None
    policy = make_policy(options.policy, max_model_len=MAX_MODEL_LEN, chunk_tokens=chunk_tokens)
    scheduler = Scheduler(policy, ledger, max_num_seqs=options.running, max_model_len=MAX_MODEL_LEN)
    stop_ids = frozenset((2,))
    for index, tokens in enumerate(prompts + [64] * options.waiting):
        params = SamplingParams(max_tokens=MAX_MODEL_LEN // 2)
        scheduler.add(Request(f"r{index}", (7,) * tokens, params, index * 1e-6, stop_ids))
    return scheduler


def answer(plan: StepPlan) -> StepResult:
    """What an executor would say: a token for each chunk that samples."""
    tokens = tuple(SampledToken(c.seq_id, c.epoch, 7) for c in plan.chunks if c.samples)
    return StepResult(plan.step_id, tokens)


def warm_up(scheduler: Scheduler, running: int) -> None:
    """Step until every running sequence decodes."""
    for _ in range(10 * running + 1000):
        plan = scheduler.plan(1.0)
        if not plan.is_empty:
            scheduler.commit(answer(plan))
        if len(plan.chunks) == running and plan.num_tokens == running:
            return
    raise SystemExit(f"--policy: {running} sequences never run at once under it")


def percentile(sorted_values: list[float], part: float) -> float:
    """The smallest value that at least `part` of the values do not exceed."""
    return sorted_values[min(len(sorted_values) - 1, max(0, -(-int(part * 1000) * len(sorted_values) // 1000) - 1))]


def measure(scheduler: Scheduler, steps: int, running: int) -> tuple[list[tuple[float, float, float]], int]:
    """((plan CPU, commit CPU, both wall) [ms] of each step, group crossings of all)."""
    times = []
    clock, wall = time.thread_time_ns, time.perf_counter_ns
    reserved = scheduler.ledger.reserved_groups
    for _ in range(steps):
        wall_0 = wall()
        cpu_0 = clock()
        plan = scheduler.plan(1.0)
        cpu_1 = clock()
        wall_1 = wall()
        result = answer(plan)
        wall_2 = wall()
        cpu_2 = clock()
        updates = scheduler.commit(result)
        cpu_3 = clock()
        wall_3 = wall()
        if len(updates) != running or scheduler.totals["preempted"]:
            raise SystemExit(f"not the step that was to be measured: {len(updates)} updates")
        both_wall = wall_1 - wall_0 + wall_3 - wall_2
        times.append(((cpu_1 - cpu_0) / 1e6, (cpu_3 - cpu_2) / 1e6, both_wall / 1e6))
    return times, scheduler.ledger.reserved_groups - reserved


def summary(scheduler: Scheduler, steps: int, running: int) -> dict[str, float]:
    """Measure `steps` steps and reduce them to percentiles [ms] and counts of garbage collections."""
    before = [generation["collections"] for generation in gc.get_stats()]
    times, crossings = measure(scheduler, steps, running)
    collections = [g["collections"] - old for g, old in zip(gc.get_stats(), before, strict=True)]
    cpu = sorted(plan + commit for plan, commit, _ in times)
    wall = sorted(both for _, _, both in times)
    values = {
        "p50_ms": percentile(cpu, 0.5),
        "p99_ms": percentile(cpu, 0.99),
        "max_ms": cpu[-1],
        "wall_p50_ms": percentile(wall, 0.5),
        "wall_p99_ms": percentile(wall, 0.99),
        "wall_max_ms": wall[-1],
        "plan_p50_ms": percentile(sorted(plan for plan, _, _ in times), 0.5),
        "commit_p50_ms": percentile(sorted(commit for _, commit, _ in times), 0.5),
        "crossings_per_step": crossings / steps,
        "collections": sum(collections),
        "old_collections": collections[-1],
    }
    return {name: round(value, 3) for name, value in values.items()}


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit status 1 when p99 is above the limit."""
    parser = argparse.ArgumentParser(prog="bench_step", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--running", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--policy", choices=("sarathi", "vllm", "simple_chunking"), default="sarathi")
    parser.add_argument("--admission", choices=sorted(ADMISSION_RULES), default="exact")
    parser.add_argument("--group-tokens", type=int, default=16, help="tokens a page group holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-ms", type=float, default=LIMIT_MS, help="p99 above this: exit status 1")
    options = parser.parse_args(arguments)
    scheduler = build(options)
    warm_up(scheduler, options.running)
    gc.collect()
    default = summary(scheduler, options.steps, options.running)
    settle_heap()
    settled = summary(scheduler, options.steps, options.running)
    scheduler.check()
    result: dict[str, object] = {
        "benchmark": "step",
        "policy": options.policy,
        "admission": options.admission,
        "running": options.running,
        "waiting": options.waiting,
        "steps": options.steps,
        "group_tokens": options.group_tokens,
        "clock": "CPU time of the thread; wall_* beside it",
        **settled,
        "default_collector": default,
        "limit_p99_ms": options.limit_ms,
        **machine(),
    }
    print(f"{options.running} running, {options.waiting} waiting, {settled['crossings_per_step']} new groups a step")
    for name, numbers in (("default collector", default), ("engine process", settled)):
        print(
            f"{name:18} CPU p50 {numbers['p50_ms']:.3f} ms (plan {numbers['plan_p50_ms']:.3f}, commit "
            f"{numbers['commit_p50_ms']:.3f}), p99 {numbers['p99_ms']:.3f} ms, max "
            f"{numbers['max_ms']:.3f} ms; wall p50 {numbers['wall_p50_ms']:.3f}, p99 {numbers['wall_p99_ms']:.3f}; "
            f"{numbers['collections']:.0f} collections, {numbers['old_collections']:.0f} of them full"
        )
    print(f"{result['cpu']}, {result['cores']} cores, load {result['load_1min']}, Python {result['python']}")
    print(json.dumps(result))
    return 0 if settled["p99_ms"] <= options.limit_ms else 1


if __name__ == "__main__":
    sys.exit(main())
