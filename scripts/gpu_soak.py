"""Random load on a full GPU: `python -m scripts.gpu_soak [--seconds 480] [--gpu-memory-utilization 0.95]`.

A Llama-3-8B shape with random weights takes requests of random lengths and rules, faster than it can serve them and
more than its memory holds (so some are preempted), some aborted, for so many seconds. Fails when a request ends with an
error, a step is lost, memory runs out or something is held at the end. A table every few seconds; the last line is one
JSON object. Any shape, device and model may be given.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams
from scripts.benching.environment import heading
from scripts.benching.shapes import SHAPES, write_folder

REPORT_S = 10.0


def length(rng: random.Random, median: int, most: int) -> int:
    """Lognormal with a long tail, 1..most."""
    return min(most, max(1, int(rng.lognormvariate(math.log(median), 1.0))))


def rules(rng: random.Random, median: int, most: int) -> SamplingParams:
    """Any mix of sampling rules."""
    greedy, max_tokens = rng.random() < 0.4, length(rng, median, most)
    return SamplingParams(
        max_tokens=max_tokens, min_tokens=min(max_tokens, rng.choice([0, 0, 5])), ignore_eos=True,
        temperature=0.0 if greedy else rng.choice([0.5, 1.0, 1.3]), top_k=rng.choice([0, 0, 40]),
        top_p=rng.choice([1.0, 0.9]), min_p=rng.choice([0.0, 0.0, 0.02]), seed=rng.randrange(1 << 40),
    )  # fmt: skip


class Soak:
    """An engine under load, and what became of its requests."""

    def __init__(self, engine: EngineLoop, *, vocab: int, longest: int, medians: tuple[int, int], seed: int) -> None:
        self.engine, self.vocab, self.longest, self.rng = engine, vocab, longest, random.Random(seed)
        self.prompt, self.answer = medians
        self.live: set[str] = set()
        self.ended: dict[str, int] = {}
        self.errors: list[str] = []
        self.made = self.tokens = 0

    def arrive(self) -> None:
        """One request of random length."""
        rng = self.rng
        tokens = length(rng, self.prompt, self.longest)
        name = f"r{self.made}"
        self.made += 1
        self.live.add(name)
        prompt = tuple(rng.randrange(self.vocab) for _ in range(tokens))
        self.engine.add(Request(name, prompt, rules(rng, self.answer, self.longest), 0.0))

    def step(self) -> None:
        """One step of the engine, and now and then an abort."""
        if self.live and self.rng.random() < 0.01:
            self.engine.abort(self.rng.choice(sorted(self.live)))
        for update in self.engine.step():
            self.tokens += len(update.tokens)
            if update.finish_reason is not None:
                self.live.discard(update.request_id)
                self.ended[update.finish_reason] = self.ended.get(update.finish_reason, 0) + 1
            if update.error is not None:
                self.errors.append(update.error)

    def run(self, seconds: float, waiting: int, settle_s: float) -> dict[str, Any]:
        """Keep `waiting` requests in line for so long, then let all end, by abort after settle_s. Returns counts."""
        began = said = perf_counter()
        while perf_counter() - began < seconds:
            while len(self.engine.scheduler.queues.waiting) < waiting:
                self.arrive()
            self.step()
            if perf_counter() - said > REPORT_S:
                said = perf_counter()
                print(f"{said - began:6.0f} s  {self.numbers()}", flush=True)
        settle = perf_counter()
        while self.engine.has_work:
            if perf_counter() - settle > settle_s:
                for name in sorted(self.live):
                    self.engine.abort(name)
            self.step()
        return {"seconds": round(perf_counter() - began, 1), **self.numbers()}

    def numbers(self) -> dict[str, Any]:
        """Counts so far."""
        stats = self.engine.stats()
        free = torch.cuda.mem_get_info()[0] >> 20 if torch.cuda.is_available() else None
        kept = ("preempted_total", "refused_total", "lost_steps_total", "kv_groups_in_use", "kv_slots_active",
                "kv_groups_total")  # fmt: skip
        return {"requests": self.made, "tokens": self.tokens, "ended": self.ended, "errors": len(self.errors),
                "free_mib": free, **{key: stats[key] for key in kept}}  # fmt: skip


def take_all_but(leave_bytes: int | None) -> torch.Tensor | None:
    """Hold the GPU's memory but for so many bytes; nothing when no more than that is free."""
    if leave_bytes is None:
        return None
    surplus_bytes = torch.cuda.mem_get_info()[0] - leave_bytes
    return torch.empty(surplus_bytes, dtype=torch.uint8, device="cuda") if surplus_bytes > 0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when anything failed or is held."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.95)
    parser.add_argument("--shape", default="llama3-8b", choices=tuple(SHAPES), help="with random weights")
    parser.add_argument("--model", default=None, help="a folder with weights, instead of a shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kv-pool-bytes", type=int, default=None, help="instead of the utilisation")
    parser.add_argument("--kv-page-bytes", type=int, default=2 << 20)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="median")
    parser.add_argument("--answer-tokens", type=int, default=1500, help="median: many at once, so that memory fills")
    parser.add_argument("--waiting", type=int, default=64, help="requests in line at any time")
    parser.add_argument("--settle-s", type=float, default=20.0, help="then, what still runs is aborted [20]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--leave-bytes", type=int, default=None,
                        help="take the GPU's memory before, all but so much, so that the rest is full within seconds")
    asked = parser.parse_args(arguments)
    taken = take_all_but(asked.leave_bytes)
    workload = f"soak: {asked.model or asked.shape}, {asked.seconds:.0f} s, {asked.waiting} in line, seed {asked.seed}"
    head = heading("gpu_soak", workload, arguments) | {"taken_before_bytes": taken.nbytes if taken is not None else 0}
    with tempfile.TemporaryDirectory() as scratch:
        model = asked.model
        if model is None:
            model = str(write_folder(asked.shape, Path(scratch)))
        engine = build_engine(EngineConfig(
            model=model, device=asked.device, load_format="auto" if asked.model else "dummy",
            gpu_memory_utilization=asked.gpu_memory_utilization, kv_pool_bytes=asked.kv_pool_bytes,
            kv_page_bytes=asked.kv_page_bytes,
            max_model_len=asked.max_model_len, max_num_seqs=asked.max_num_seqs))  # fmt: skip
        vocab = 500 if asked.model else SHAPES[asked.shape]["vocab_size"]
        soak = Soak(engine, vocab=vocab, longest=asked.max_model_len - 2, seed=asked.seed,
                    medians=(asked.prompt_tokens, asked.answer_tokens))  # fmt: skip
        found = head | soak.run(asked.seconds, asked.waiting, asked.settle_s)
        engine.close()
    held = found["kv_groups_in_use"] + found["kv_slots_active"] + len(soak.live)
    found["ok"] = not soak.errors and not found["lost_steps_total"] and not held
    for error in soak.errors[:5]:
        print("error:", error)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return int(not found["ok"])


if __name__ == "__main__":
    raise SystemExit(main())
