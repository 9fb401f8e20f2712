"""What knowing rho is worth to admission: the same texts, memory and risk, with rho known and with rho = 1.

    python -m scripts.bench_rho [--rho 0.709] [--risk 1e-3] [--requests 600] [--seeds 3] [--out FILE.json]

Requests come in base tokens; the patched vocabulary turns them into `rho` times as many engine tokens, with a spread
of sqrt(phi / length) from text to text. Their output lengths are known from an earlier deployment, in base tokens.
Every arm sees the same prompts, lengths and arrivals; only what admission believes differs. The scheduler is the real
one, time is virtual (scripts/simulate.py: a step takes base_s + tokens * token_s), so the figures are of scheduling,
not of a machine. Every answer is checked against the one it gets alone. Arms:

    plain            no patch: base tokens, and an admission that expects base tokens
    rho = 1          patched, and an admission that takes base lengths for engine tokens
    rho known        patched, with rho's stored statistics
    rho too low      patched, told half of the truth: what a wrong number costs
    no forecast      patched, admission that leaves the watermark only (the default)
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path

from engine.core.demand import RhoEstimator, RhoStatistics
from engine.core.growth import HISTORY, GrowthForecast
from engine.core.request import Request
from scripts import simulate

# Of the medical patch in docs/vocabularies.md, held-out documents: the figures its artefact stores.
RHO, PHI = 0.709, 1.314
DOCUMENTS, DOCUMENT_TOKENS = 1696, 268
ARMS = ("plain", "rho = 1", "rho known", "rho too low", "no forecast")


def lengths(rng: random.Random, low: int, high: int, mean: float, spread: float) -> int:
    """A length in base tokens, lognormal."""
    return min(high, max(low, round(rng.lognormvariate(mean, spread))))


class World(simulate.Simulation):
    """One arm on one seed."""

    def __init__(self, options: argparse.Namespace, arm: str, seed: int) -> None:
        self.arm = arm
        self.true_rho = 1.0 if arm == "plain" else options.rho
        self.concurrency: list[int] = []
        self.base_outputs: list[int] = []
        self.texts = random.Random(seed)
        super().__init__(argparse.Namespace(**{**vars(options), "seed": seed}))

    def stored(self) -> RhoStatistics | None:
        """What admission is told of rho."""
        told = {"rho known": self.true_rho, "rho too low": self.true_rho / 2}.get(self.arm)
        if told is None:
            return None
        base = DOCUMENTS * DOCUMENT_TOKENS
        return RhoStatistics("bench", DOCUMENTS, base, round(told * base), math.sqrt(PHI / base), PHI, told, told * 1.1,
                             told * 1.2, 6.0)

    def forecast(self) -> GrowthForecast | None:
        """The arm's: the history of an earlier deployment, and what it is told of rho."""
        rng = random.Random(-1)
        history = [self.output_length(rng) for _ in range(HISTORY)]
        if self.arm == "no forecast":
            return None
        return GrowthForecast(self.options.admission_risk, self.options.group_tokens, RhoEstimator(self.stored()),
                              history)

    def output_length(self, rng: random.Random) -> int:
        """Base tokens of an output."""
        return lengths(rng, 4, self.options.max_tokens - 1, self.options.output_log_mean, 0.7)

    def patched(self, base_tokens: int) -> int:
        """Engine tokens of one text; the same draw in every arm."""
        noise = self.texts.gauss(0.0, math.sqrt(PHI * base_tokens))
        return max(1, round(self.true_rho * base_tokens + (0.0 if self.arm == "plain" else noise)))

    def requests(self) -> list[Request]:
        """The same texts in every arm, in the arm's tokens."""
        rng, at_s, found = random.Random(self.options.seed), 0.0, []
        for _ in range(self.options.requests):
            at_s += rng.expovariate(self.options.rate)
            prompt = lengths(rng, 8, 900, self.options.prompt_log_mean, 0.8)
            output = self.output_length(rng)
            tokens = tuple(rng.randrange(simulate.VOCAB) for _ in range(self.patched(prompt)))
            found.append(self.request(tokens, self.patched(output), at_s))
            self.base_outputs.append(output)
        return found

    def run(self) -> None:
        """See Simulation; then what ran at once, while there was a queue."""
        super().run()
        self.concurrency = [record.running for record in self.scheduler.records if record.waiting]


def longest_gap(client: simulate.Client) -> float:
    """The longest time that one request waited for its next token, once it had the first [virtual s]."""
    return max((b - a for a, b in itertools.pairwise(client.times_s)), default=0.0)


def arm_of(options: argparse.Namespace, arm: str) -> dict[str, float]:
    """One arm over every seed."""
    rows = []
    for seed in range(options.seeds):
        world = World(options, arm, seed)
        world.run()
        world.verify()
        totals = world.scheduler.totals
        over = sum(1 for record in world.scheduler.records if record.preempted)
        rows.append({
            "base_tokens_per_s": sum(world.base_outputs) / world.now_s,
            "running": statistics.fmean(world.concurrency or [0]),
            "preemptions": float(totals["preempted"]),
            "steps_with_preemption_percent": 100 * over / totals["steps"],
            "longest_gap_p99_s": simulate.percentile([longest_gap(client) for client in world.clients.values()], 0.99),
            "virtual_s": world.now_s,
        })  # fmt: skip
    return {name: round(statistics.fmean(row[name] for row in rows), 3) for name in rows[0]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(prog="bench_rho", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--rho", type=float, default=RHO, help="engine tokens for a base token")
    add("--risk", dest="admission_risk", type=float, default=1e-3, help="of the forecast")
    add("--requests", type=int, default=600)
    add("--seeds", type=int, default=3)
    add("--rate", type=float, default=1000.0, help="requests a virtual second; high: there is always a queue")
    add("--prompt-log-mean", type=float, default=4.6, help="log of the median prompt [base tokens]")
    add("--output-log-mean", type=float, default=5.3, help="log of the median output [base tokens]")
    add("--max-tokens", type=int, default=1024, help="what every request asks for")
    add("--pool-tokens", type=int, default=16_000, help="engine tokens that the pool holds")
    add("--group-tokens", type=int, default=32, help="of a page group (Llama-3-8B, 2 MiB pages: 32)")
    add("--max-num-seqs", type=int, default=256)
    add("--base-s", type=float, default=0.01)
    add("--token-s", type=float, default=1e-5)
    add("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args(arguments)
    vars(options).update(policy="sarathi", admission="exact", max_model_len=4096, depth=1, abort=0.0, refuse=0.0,
                         tbt_target_ms=None, chunk_tokens=None, prompt_order="arrival", ttft_target_ms=None)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run every arm, print the table and one line of JSON."""
    options = parse(arguments)
    arms = {arm: arm_of(options, arm) for arm in ARMS}
    print(f"{'':14}{'running':>9}{'base tokens/s':>15}{'preemptions':>13}{'steps with one':>16}{'longest gap':>13}")
    for arm, row in arms.items():
        print(f"{arm:14}{row['running']:9.1f}{row['base_tokens_per_s']:15.0f}{row['preemptions']:13.1f}"
              f"{row['steps_with_preemption_percent']:15.2f}%{row['longest_gap_p99_s']:11.2f} s")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {"benchmark": "rho", "settings": settings, "phi": PHI, "arms": arms}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
