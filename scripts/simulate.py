"""A scheduler's day in virtual time: random arrivals, aborts and refused memory, from one seed.

    python -m scripts.simulate [--policy sarathi] [--seed 0] [--requests 2000] [--rate 40] [--pool-tokens 60000]
                               [--depth 1] [--abort 0.02] [--refuse 0.0] [--admission exact] [--admission-risk 1e-3]
                               [--max-tokens 0]

With --max-tokens every request asks for so many and ends by itself earlier. A step takes base_s + tokens * token_s of
virtual time. After every step the scheduler's books are checked; at the
end every request must have ended, every answer must be the one it gets alone (the "model" is a hash of all tokens
before), and nothing may be held. Prints time to first token (first token - arrival), time between tokens, and counts,
then one line of JSON. Exit status 1 when a promise was broken; the seed repeats it. It measures no real time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import deque
from dataclasses import dataclass, field

from engine.core.demand import RhoEstimator
from engine.core.growth import GrowthForecast
from engine.core.ledger import ADMISSION_RULES, KvLedger
from engine.core.plan import SampledToken, StepPlan, StepResult, Update
from engine.core.policies import Pace, make_policy, policies
from engine.core.request import Request, SamplingParams
from engine.core.scheduler import Scheduler

VOCAB = 32_000
EOS = VOCAB  # no hash gives it
MODULUS = (1 << 61) - 1


def mix(state: int, token: int) -> int:
    """The hash of all tokens so far and one more."""
    return (state * 1_000_003 + token + 1) % MODULUS


def truth(request: Request, count: int) -> list[int]:
    """The first `count` outputs of a request served alone."""
    state, outputs = 0, []
    for token in request.prompt:
        state = mix(state, token)
    for _ in range(count):
        outputs.append(state % VOCAB)
        state = mix(state, outputs[-1])
    return outputs


@dataclass
class HashExecutor:
    """Runs plans with the hash as the model; refuses a chunk's memory with probability `refuse`."""

    rng: random.Random
    refuse: float
    lengths: list[int] = field(default_factory=list)  # request -> output at which it ends by itself; its seed names it
    goals: dict[int, int] = field(default_factory=dict)  # seq_id -> outputs still to come before EOS
    states: dict[int, int] = field(default_factory=dict)  # seq_id -> hash of all its known tokens
    plans: deque[StepPlan] = field(default_factory=deque)

    def submit(self, plan: StepPlan) -> None:
        """See engine.core.executor.Executor."""
        self.plans.append(plan)

    def wait(self) -> StepResult:
        """See engine.core.executor.Executor."""
        plan = self.plans.popleft()
        for seq_id in plan.releases:
            self.states.pop(seq_id, None)
        for admission in plan.admissions:
            state = 0
            for token in admission.tokens:
                state = mix(state, token)
            self.states[admission.seq_id] = state
            self.goals[admission.seq_id] = self.lengths[admission.params.seed or 0] - admission.num_outputs
        tokens, refused = [], []
        for chunk in plan.chunks:
            if self.refuse and self.rng.random() < self.refuse:
                refused.append(chunk.seq_id)
                del self.states[chunk.seq_id]
            elif chunk.samples:
                state = self.states[chunk.seq_id]
                self.goals[chunk.seq_id] -= 1
                token = state % VOCAB if self.goals[chunk.seq_id] else EOS
                tokens.append(SampledToken(chunk.seq_id, chunk.epoch, token))
                self.states[chunk.seq_id] = mix(state, token)
        return StepResult(plan.step_id, tuple(tokens), tuple(refused))


@dataclass
class Client:
    """What one request got, and when [virtual seconds]."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    reason: str | None = None


class Simulation:
    """One seed's world, stepped to its end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        ledger = KvLedger(
            -(-options.pool_tokens // options.group_tokens),
            lambda tokens: -(-tokens // options.group_tokens),
            ADMISSION_RULES[options.admission],
        )
        pace = None
        if options.tbt_target_ms is not None:
            pace = Pace(options.tbt_target_ms / 1e3, (options.tbt_bound_ms or options.tbt_target_ms) / 1e3)
        ttft_target_s = None if options.ttft_target_ms is None else options.ttft_target_ms / 1e3
        policy = make_policy(
            options.policy, max_model_len=options.max_model_len, chunk_tokens=options.chunk_tokens, pace=pace,
            prompt_order=options.prompt_order, ttft_target_s=ttft_target_s,
        )  # fmt: skip
        self.scheduler = Scheduler(
            policy,
            ledger,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            depth=options.depth,
            forecast=self.forecast(),
            pace=pace,
        )
        self.executor = HashExecutor(self.rng, options.refuse)
        self.now_s = 0.0
        self.clients: dict[str, Client] = {}
        self.arrivals = deque(self.requests())

    def forecast(self) -> GrowthForecast | None:
        """What --admission-risk asks for, without any history."""
        risk = self.options.admission_risk
        return None if risk is None else GrowthForecast(risk, self.options.group_tokens, RhoEstimator())

    def requests(self) -> list[Request]:
        """Everyone who will come, in order of arrival."""
        rng, limit, at_s, requests = self.rng, self.options.max_model_len, 0.0, []
        for _ in range(self.options.requests):
            at_s += rng.expovariate(self.options.rate)
            prompt = min(limit - 1, max(1, int(rng.lognormvariate(5.0, 1.0))))
            outputs = min(limit, max(1, int(rng.lognormvariate(4.5, 0.8))))
            tokens = tuple(rng.randrange(VOCAB) for _ in range(prompt))
            requests.append(self.request(tokens, outputs, at_s))
        return requests

    def request(self, prompt: tuple[int, ...], outputs: int, at_s: float) -> Request:
        """The next request; it ends by itself after `outputs` tokens unless it asks for fewer."""
        index = len(self.executor.lengths)
        asked = self.options.max_tokens or outputs
        self.executor.lengths.append(outputs if asked > outputs else 0)  # 0: never
        params = SamplingParams(max_tokens=asked, seed=index)
        return Request(f"r{index}", prompt, params, at_s, frozenset((EOS,)))

    def run(self) -> None:
        """Until every request has ended. Raises InvariantError or AssertionError for a broken promise."""
        scheduler, idle = self.scheduler, 0
        while self.arrivals or scheduler.has_work:
            while self.arrivals and self.arrivals[0].arrival_s <= self.now_s:
                request = self.arrivals.popleft()
                self.clients[request.request_id] = Client(request)
                scheduler.add(request)
            plan = scheduler.plan(self.now_s)
            if not plan.is_empty:
                self.executor.submit(plan)
                self.now_s += self.options.base_s + self.options.token_s * plan.num_tokens
                idle = 0
                if scheduler.num_in_flight < self.options.depth:
                    continue
            if self.executor.plans:
                self._take(scheduler.commit(self.executor.wait()))
            else:
                self._take(scheduler.drain())
                idle += plan.is_empty
                if self.arrivals and not scheduler.has_work:
                    self.now_s, idle = max(self.now_s, self.arrivals[0].arrival_s), 0
                assert idle < 4, f"no progress at {self.now_s:.3f} s: {scheduler.stats()}"
            if self.rng.random() < self.options.abort and self.clients:
                scheduler.abort(f"r{self.rng.randrange(len(self.clients))}")
            scheduler.check()

    def _take(self, updates: list[Update]) -> None:
        for update in updates:
            client = self.clients[update.request_id]
            assert client.reason is None, f"{update.request_id} got news after its end"
            client.tokens += update.tokens
            client.times_s += [self.now_s] * len(update.tokens)
            client.reason = update.finish_reason

    def verify(self) -> None:
        """Everyone ended, with the answer it gets alone, and nothing is held."""
        limit = self.options.max_model_len
        for name, client in self.clients.items():
            request = client.request
            assert client.reason is not None, f"{name} never ended"
            whole = min(request.params.max_tokens or limit, limit - len(request.prompt))
            length, tokens = len(client.tokens), list(client.tokens)
            assert client.reason != "length" or length == whole, f"{name}: {length} of {whole}"
            if client.reason == "stop":
                assert tokens.pop() == EOS and length == self.executor.lengths[request.params.seed or 0]
            assert tokens == truth(request, len(tokens)), f"{name} got another answer than alone"
        assert not self.executor.states, f"{len(self.executor.states)} slots are still held"
        ledger = self.scheduler.ledger
        assert ledger.free_groups + ledger.withheld_groups == ledger.total_groups


def percentile(values: list[float], part: float) -> float:
    """The value that `part` of the sorted values do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def report(simulation: Simulation) -> dict[str, object]:
    """Latencies in virtual seconds and the scheduler's totals."""
    clients = list(simulation.clients.values())
    ttft = [c.times_s[0] - c.request.arrival_s for c in clients if c.times_s]
    between = [b - a for c in clients for a, b in zip(c.times_s, c.times_s[1:], strict=False)]
    numbers = {f"ttft_p{p}_s": round(percentile(ttft, p / 100), 4) for p in (50, 99)}
    numbers |= {f"tbt_p{p}_s": round(percentile(between, p / 100), 4) for p in (50, 99)}
    return {
        "simulation": vars(simulation.options),
        "virtual_s": round(simulation.now_s, 3),
        **numbers,
        "output_tokens_per_s": round(sum(len(c.tokens) for c in clients) / max(simulation.now_s, 1e-9), 1),
        **simulation.scheduler.totals,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="simulate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--policy", choices=policies.names(), default="sarathi")
    parser.add_argument("--admission", choices=sorted(ADMISSION_RULES), default="exact")
    parser.add_argument("--admission-risk", type=float, help="expected growth is left free at this risk")
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens that every request asks for; 0: its length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=40.0, help="requests per virtual second")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--pool-tokens", type=int, default=60_000)
    parser.add_argument("--group-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--tbt-target-ms", type=float, default=None, help="adapt chunks to step times (sarathi)")
    parser.add_argument("--tbt-bound-ms", type=float, default=None, help="while many wait; default: the target")
    parser.add_argument("--prompt-order", choices=("arrival", "shortest", "deadline"), default="arrival")
    parser.add_argument("--ttft-target-ms", type=float, default=None, help="order deadline: to the first token")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--abort", type=float, default=0.02, help="probability of an abort after a step")
    parser.add_argument("--refuse", type=float, default=0.0, help="probability that a chunk's memory is refused")
    parser.add_argument("--base-s", type=float, default=0.01, help="virtual seconds of a step")
    parser.add_argument("--token-s", type=float, default=1e-5, help="virtual seconds of a token in it")
    simulation = Simulation(parser.parse_args(arguments))
    try:
        simulation.run()
        simulation.verify()
    except Exception as error:
        print(f"seed {simulation.options.seed}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    numbers = report(simulation)
    print(
        f"{len(simulation.clients)} requests in {numbers['virtual_s']} virtual s: TTFT p50 {numbers['ttft_p50_s']} s, "
        f"p99 {numbers['ttft_p99_s']} s; between tokens p50 {numbers['tbt_p50_s']} s, p99 {numbers['tbt_p99_s']} s; "
        f"{numbers['preempted']} preemptions"
    )
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
