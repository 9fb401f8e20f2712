"""What do encoded layers cost a step? The same steps on a plain and on encoded engines, in turns, in this process.

    python -m scripts.scx overhead [--model DIR] [--layers 0,29] [--batch 64] [--rounds 15] [--threads N]
    python -m scripts.scx overhead --shape 32,8,128

Decodes: `--batch` sequences, one token each a step. Prefill: one chunk of 512 tokens a step. Admission: the step that
takes one request of one token in, which derives its maps; "open" is that part of it. Each round runs a few
steps of every engine, and an engine's figure is the median over rounds of its fastest step, so that a busy machine
disturbs all alike. Prints ms a step and the ratio to plain; the last line is JSON. With --shape (layers, all encoded,
KV heads, head size) no engine runs: it prints what opening a session takes by scheme, and what its maps take in memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, cast

import torch

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams
from engine.loading.resolve import resolve_model
from engine.scx.config import ScxConfig
from engine.scx.keys import fresh_root
from engine.scx.schemes import map_bytes
from engine.scx.secure import HeadShape, LocalSecureSide, SecureSide

STEPS = 5  # of each engine in a round
CHUNK_TOKENS = 512
CONTEXT_TOKENS = 128  # of a decoding sequence at the start


def timed(call: Callable[..., str], into: list[float]) -> Callable[..., str]:
    """The call, its milliseconds appended to a list."""

    def run_it(*arguments: Any, **named: Any) -> str:
        before_s = perf_counter()
        done = call(*arguments, **named)
        into.append(1e3 * (perf_counter() - before_s))
        return done

    return run_it


class Runner:
    """One engine and its timings in milliseconds."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.fastest_ms: dict[str, list[float]] = {"decode": [], "prefill": [], "admission": []}
        self.open_ms: list[float] = []
        self.engine: EngineLoop = build_engine(EngineConfig(**settings))
        self._count = 0
        sessions = cast(Any, self.engine.executor).runner.scx
        if sessions is not None:
            secure: SecureSide = sessions.scx.secure
            secure.open = timed(secure.open, self.open_ms)  # type: ignore[method-assign]

    def add(self, tokens: int, outputs: int) -> None:
        """Queue one prompt of so many tokens."""
        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        prompt = tuple(5 + (self._count * 31 + i * 7) % 400 for i in range(tokens))
        self.engine.add(Request(str(self._count), prompt, params, arrival_s=0.0))

    def drain(self) -> None:
        """Run until nothing is left."""
        while self.engine.has_work:
            self.engine.step()

    def fastest(self, steps: int) -> float:
        """The fastest of some steps, ms."""
        taken = []
        for _ in range(steps):
            before_s = perf_counter()
            self.engine.step()
            taken.append(1e3 * (perf_counter() - before_s))
        return min(taken)


def run(runners: Sequence[Runner], rounds: int, batch: int) -> None:
    """Alternate; every round's fastest step goes into each runner's lists."""
    for runner in runners:
        for _ in range(batch):
            runner.add(CONTEXT_TOKENS, (rounds + 2) * STEPS)
        while runner.engine.stats()["running"] < batch or runner.engine.stats()["waiting"]:
            runner.engine.step()
        runner.fastest(STEPS)
    for _ in range(rounds):
        for runner in runners:
            runner.fastest_ms["decode"].append(runner.fastest(STEPS))
    for runner in runners:
        runner.drain()
    for _ in range(rounds):
        for runner in runners:
            runner.add(CHUNK_TOKENS * 3, 1)
            runner.fastest_ms["prefill"].append(runner.fastest(3))
            runner.drain()
            runner.add(1, 1)
            runner.fastest_ms["admission"].append(runner.fastest(1))
            runner.drain()


def opening(layers: int, kv_heads: int, head_dim: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of opening a session and bytes of its maps, by scheme; every layer encoded, one thread."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for scheme in ("perm", "rotate", "mix"):
        config = ScxConfig(tuple(range(layers)), scheme=scheme)
        shape = HeadShape(kv_heads, kv_heads, head_dim, 1, 16)
        rope = torch.zeros(16, 2, head_dim // 2)
        secure = LocalSecureSide(config, shape, rope, fresh_root(), b"", torch.device("cpu"))
        taken: list[float] = []
        for nonce in range(rounds):
            timed(secure.open, taken)(0, nonce.to_bytes(16, "big"))
            secure.close(0)
        size = map_bytes(scheme, layers, kv_heads, head_dim)
        found[scheme] = {"open_ms": round(statistics.median(taken), 1), "map_bytes": size}
        print(f"{scheme:12} open {statistics.median(taken):8.1f} ms, maps {size / (1 << 20):8.1f} MiB a session")
    return found


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx overhead", description=__doc__)
    parser.add_argument("--model", help="a folder; SmolLM2-135M-Instruct without it")
    parser.add_argument("--layers", default="0,29")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="of a step; all usable cores without it")
    parser.add_argument("--shape", help="layers, KV heads, head size: only what opening a session takes")
    options = parser.parse_args(argv)
    if options.shape:
        layers, kv_heads, head_dim = map(int, options.shape.split(","))
        print(json.dumps({"shape": options.shape, **opening(layers, kv_heads, head_dim, options.rounds)}))
        return 0
    logging.getLogger("engine").setLevel(logging.ERROR)
    common = {"model": str(resolve_model(options.model)), "dtype": options.dtype, "max_num_seqs": options.batch,
              "max_model_len": 4 * CHUNK_TOKENS, "kv_pool_bytes": 1 << 30, "chunk_tokens": CHUNK_TOKENS,
              "threads": options.threads}  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {"plain": {}}
    for scheme in ("perm", "rotate", "mix"):
        kinds[scheme] = {"scx_layers": options.layers, "scx_scheme": scheme}
    kinds["perm sealed"] = {**kinds["perm"], "scx_page_seal": True}
    runners = [Runner(name, {**common, **settings}) for name, settings in kinds.items()]
    run(runners, options.rounds, options.batch)
    table: dict[str, dict[str, float]] = {}
    for runner in runners:
        table[runner.name] = {work: statistics.median(times) for work, times in runner.fastest_ms.items()}
        ratios = {work: table[runner.name][work] / table["plain"][work] for work in table["plain"]}
        print(f"{runner.name:12} " + "  ".join(
            f"{work} {table[runner.name][work]:8.2f} ms x{ratios[work]:.3f}" for work in ratios)
            + (f"  open {statistics.median(runner.open_ms):.2f} ms" if runner.open_ms else ""))
        runner.engine.close()
    print(json.dumps({"layers": options.layers, "batch": options.batch, "ms": table}))
    return 0

