"""Runs a workload on an engine in this process and notes when each token came out of the loop.

Offline and online differ only in arrivals. What an engine did not really produce is an error, not a figure. It knows
nothing of text, HTTP or what a good result is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from engine.core.clock import Clock, MonotonicClock
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams
from scripts.benching.metrics import Timeline
from scripts.benching.workloads import Workload, random_prompts, warm_up

NAP_S = 0.0005


class NotProduced(RuntimeError):
    """The engine did not do what the workload asks; there is no figure to report."""


@dataclass(slots=True)
class Run:
    """One run. seconds: start to the last result; distinct_tokens: different ids among all outputs."""

    timelines: list[Timeline]
    seconds: float
    steps: int
    preempted: int
    distinct_tokens: int
    step_s: list[float] = field(default_factory=list)


def run(
    engine: EngineLoop,
    workload: Workload,
    vocab: int,
    *,
    seed: int = 0,
    label: str = "",
    clock: Clock | None = None,
    nap: Callable[[float], None] = time.sleep,
) -> Run:
    """Every request at its arrival, greedy, exactly its output tokens, to the end. label: of the progress bar. clock,
    nap: the engine's time, and what lets so many seconds of it pass; real time unless given.

    Raises NotProduced.
    """
    prompts = random_prompts(workload, vocab, seed)
    before = engine.stats()
    timelines = [Timeline(item.arrival_s, item.prompt_tokens) for item in workload.items]
    seen: set[int] = set()
    clock, added, step_s = clock or MonotonicClock(), 0, []
    with tqdm(total=workload.output_tokens, desc=label or workload.name, unit="tok", disable=None) as bar:
        start_s = clock.now_s()
        while added < len(prompts) or engine.has_work:
            now_s = clock.now_s() - start_s
            while added < len(prompts) and workload.items[added].arrival_s <= now_s:
                _add(engine, workload, added, prompts[added], start_s)
                added += 1
            if not engine.has_work:
                nap(min(NAP_S, max(0.0, workload.items[added].arrival_s - now_s)))
                continue
            _step(engine, timelines, workload, seen, clock, start_s, bar)
            step_s.append(clock.now_s() - start_s - now_s)
        seconds = clock.now_s() - start_s
    _check(workload, timelines)
    after = engine.stats()
    return Run(timelines, seconds, int(after["steps_total"] - before["steps_total"]),
               int(after["preempted_total"] - before["preempted_total"]), len(seen), step_s)  # fmt: skip


def _add(engine: EngineLoop, workload: Workload, index: int, prompt: list[int], start_s: float) -> None:
    item = workload.items[index]
    params = SamplingParams(temperature=0.0, max_tokens=item.output_tokens, ignore_eos=True)
    engine.add(Request(f"bench-{index}", tuple(prompt), params, start_s + item.arrival_s))


def _step(
    engine: EngineLoop, timelines: list[Timeline], workload: Workload, seen: set[int], clock: Clock,
    start_s: float, bar: tqdm[None],
) -> None:  # fmt: skip
    """One step; its tokens get the time at which they left the loop."""
    updates = engine.step()
    at_s = clock.now_s() - start_s
    made = 0
    for update in updates:
        name, reason = update.request_id, update.finish_reason
        if reason not in (None, "length"):
            raise NotProduced(f"{workload.name}: {name} ended with {reason}: {update.error or 'no reason given'}")
        timeline = timelines[int(name.removeprefix("bench-"))]
        timeline.token_s += [at_s] * len(update.tokens)
        timeline.num_tokens += len(update.tokens)
        seen.update(update.tokens)
        made += len(update.tokens)
    bar.update(made)


def _check(workload: Workload, timelines: Sequence[Timeline]) -> None:
    """Every request has exactly its tokens."""
    for index, (item, timeline) in enumerate(zip(workload.items, timelines, strict=True)):
        if timeline.num_tokens != item.output_tokens:
            raise NotProduced(f"{workload.name}: request {index} made {timeline.num_tokens} tokens of "
                              f"{item.output_tokens}")


def repeat(engine: EngineLoop, workload: Workload, vocab: int, runs: int) -> list[Run]:
    """A short warm-up that is not counted, then `runs` runs; a line each."""
    run(engine, warm_up(workload), vocab, seed=1, label="warm-up")
    found = []
    for number in range(runs):
        found.append(run(engine, workload, vocab, label=f"run {number + 1} of {runs}"))
        tokens = workload.output_tokens / found[-1].seconds
        print(f"{workload.name}, run {number + 1}: {found[-1].seconds:.2f} s, {found[-1].steps} steps, "
              f"{tokens:,.1f} output tok/s", flush=True)  # fmt: skip
    return found
