"""An online workload on imagined GPUs, in virtual time: `python -m scripts.simulate_online [--rate 8] [--machines 8]`.

The engine's own loop, scheduler, pace and order of prompts run `online_mixed` with two steps under way; only the steps
are imagined. A step lasts as H200s were measured to take for Llama-3-8B's shape (DECODES, TOKEN_S, ...), times an error
that belongs to a machine and a size of step, since products of some sizes are tuned better than others, times a little
noise. Prints, by rate and slowness, each figure's mean over the machines and its worst. The seed repeats it; it
measures no real time, and says what a rule of the scheduler does, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core.clock import VirtualClock
from engine.core.ledger import ADMISSION_RULES, KvLedger
from engine.core.load import Load, load_of
from engine.core.loop import EngineLoop
from engine.core.plan import SampledToken, StepPlan, StepResult
from engine.core.policies import Pace, make_policy
from engine.core.scheduler import Scheduler
from scripts.benching import drive
from scripts.benching.metrics import Timeline, latency
from scripts.benching.workloads import find, warm_up

BASE_S, TOKEN_S, CACHED_S, PAIR_S = 4.1e-3, 17.8e-6, 34e-9, 0.87e-9  # of a step, and of each part of its load
GRAIN_TOKENS = 128  # products of more than FINE_TOKENS are rounded up to it
FINE_TOKENS = 256
NOISE = 0.005
LAUNCH_S, LAUNCH_GRAPH_S, COMMIT_S = 6e-3, 1.5e-3, 0.2e-3  # of the host: a step with prompts, one without; afterwards
LEAST_NAP_S = 1e-6  # a shorter one might not move the clock
VOCAB = 2
MAX_TOKENS, BLOCK_TOKENS, BLOCKS = 16384, 16, 40_000


class Machine:
    """How long steps take on one GPU. slowness: times everything; spread: of sizes' errors, a standard deviation."""

    def __init__(self, seed: int, slowness: float = 1.0, spread: float = 0.03) -> None:
        self._noise = random.Random(seed)
        sizes = random.Random(seed)
        self._slowness = slowness
        self._of_size = [1 + spread * sizes.gauss(0, 1) for _ in range(MAX_TOKENS // GRAIN_TOKENS + 1)]

    def step_s(self, load: Load) -> float:
        """Seconds of a step."""
        tokens, wrong = load.tokens, 1.0
        if tokens > FINE_TOKENS:
            grains = -(-tokens // GRAIN_TOKENS)
            tokens, wrong = grains * GRAIN_TOKENS, self._of_size[grains]
        seconds = (BASE_S + TOKEN_S * tokens) * wrong + CACHED_S * load.cached + PAIR_S * load.pairs
        return self._slowness * seconds * max(0.5, 1 + NOISE * self._noise.gauss(0, 1))


@dataclass
class ImaginedGpu:
    """An executor whose steps take virtual time, one after the other, launched while the one before runs."""

    clock: VirtualClock
    machine: Machine
    _free_s: float = 0.0
    _under_way: deque[tuple[StepPlan, float]] = field(default_factory=deque)

    def submit(self, plan: StepPlan) -> None:
        """See engine.core.executor.Executor."""
        self.clock.advance(LAUNCH_S if any(chunk.length > 1 for chunk in plan.chunks) else LAUNCH_GRAPH_S)
        self._free_s = max(self._free_s, self.clock.now_s()) + self.machine.step_s(load_of(plan.chunks))
        self._under_way.append((plan, self._free_s))

    def wait(self) -> StepResult:
        """See engine.core.executor.Executor."""
        plan, ends_s = self._under_way.popleft()
        self.clock.advance(max(0.0, ends_s - self.clock.now_s()) + COMMIT_S)
        tokens = tuple(SampledToken(chunk.seq_id, chunk.epoch, 1) for chunk in plan.chunks if chunk.samples)
        return StepResult(plan.step_id, tokens, ())

    def close(self) -> None:
        """Nothing to give back."""


def simulated(asked: argparse.Namespace, rate: float, machine: Machine) -> list[Timeline]:
    """One run of online_mixed, after a warm-up, as `scripts.bench serve` does it."""
    clock = VirtualClock()
    pace = Pace(asked.tbt_target_ms / 1e3, asked.tbt_bound_ms / 1e3)
    policy = make_policy("sarathi", max_model_len=MAX_TOKENS, chunk_tokens=asked.chunk_size, pace=pace,
                         prompt_order=asked.prompt_order, ttft_target_s=asked.ttft_target_ms / 1e3)  # fmt: skip
    ledger = KvLedger(BLOCKS, lambda tokens: -(-tokens // BLOCK_TOKENS), ADMISSION_RULES["exact"])
    scheduler = Scheduler(policy, ledger, max_num_seqs=512, max_model_len=MAX_TOKENS, depth=2, ahead=True, pace=pace)
    loop = EngineLoop(scheduler, ImaginedGpu(clock, machine), clock=clock)
    workload = find("online_mixed", rate=rate, seconds=asked.seconds)

    def nap(seconds: float) -> None:
        clock.advance(max(seconds, LEAST_NAP_S))

    drive.run(loop, warm_up(workload), VOCAB, label="warm-up", clock=clock, nap=nap)
    return drive.run(loop, workload, VOCAB, label=workload.name, clock=clock, nap=nap).timelines


def flags() -> argparse.ArgumentParser:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m scripts.simulate_online", description=__doc__)
    parser.add_argument("--rate", default="8,12", help="requests a second, with commas [8,12]")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which requests come [20]")
    parser.add_argument("--machines", type=int, default=8, help="of each slowness [8]")
    parser.add_argument("--slowness", default="0.97,1,1.03", help="of GPUs, with commas [0.97,1,1.03]")
    parser.add_argument("--spread", type=float, default=0.03, help="of a machine's errors by size of step [0.03]")
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--tbt-target-ms", type=float, default=20.0)
    parser.add_argument("--tbt-bound-ms", type=float, default=34.4)
    parser.add_argument("--prompt-order", default="deadline", choices=("arrival", "shortest", "deadline"))
    parser.add_argument("--ttft-target-ms", type=float, default=1050.0)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    asked = flags().parse_args(arguments)
    names = ("ttft_p50_s", "ttft_p99_s", "tbt_p99_s", "tbt_max_s")
    print(f"{'mean / worst, ms':18}" + "".join(f"{name.removesuffix('_s'):>18}" for name in names))
    for rate in map(float, asked.rate.split(",")):
        for slowness in map(float, asked.slowness.split(",")):
            found = [latency(simulated(asked, rate, Machine(seed, slowness, asked.spread)))
                     for seed in range(asked.machines)]  # fmt: skip
            line = f"{rate:g}/s, {slowness:g} of time".ljust(18)
            for name in names:
                values = [1e3 * getattr(one, name) for one in found]
                line += f"{sum(values) / len(values):9.1f} /{max(values):7.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
