"""What a secure worker costs: tokens a second plain, with keys in this process, and with keys in a worker.

    python -m scripts.scx worker [--model FOLDER] [--layers 0,29] [--batch 16] [--outputs 64] [--rounds 3]

The three engines stand side by side and take turns, so that a noisy machine is noisy to all; the best round of each
counts. Of each secure side it tells the time of an encode (with the slab's write) and a decode, median and least; and
bytes for a row and encoded layer beside the formula, item bytes x 4 x (H + G) x D. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from engine import LLM, SamplingParams

PROMPT_TOKENS = 32


def timed(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same call, its seconds noted."""

    def with_clock(*arguments: Any, **named: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            into.append(time.perf_counter() - begin_s)

    return with_clock


class Contender:
    """One engine and what was measured of it."""

    def __init__(self, model: str | None, batch: int, **settings: Any) -> None:
        self.llm = LLM(model, max_num_seqs=batch, max_model_len=1024, **settings)
        self.best_tps = 0.0
        self.encode_s: list[float] = []
        self.decode_s: list[float] = []
        runner: Any = self.llm.engine.executor.runner  # type: ignore[attr-defined]
        self.secure: Any = None if runner.scx is None else runner.scx.scx.secure
        if self.secure is not None:
            self.secure.encode_store = timed(self.secure.encode_store, self.encode_s)
            self.secure.decode = timed(self.secure.decode, self.decode_s)

    def run(self, batch: int, outputs: int) -> None:
        """One round: a batch of prompts, all decoded together."""
        prompts = [[100 + i] * PROMPT_TOKENS for i in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        begin_s = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        self.best_tps = max(self.best_tps, batch * outputs / (time.perf_counter() - begin_s))

    def facts(self, layers: int, rows: int) -> dict[str, float]:
        """Of a secure side. rows: token rows that ran in all rounds."""
        traffic = self.secure.traffic
        return {
            "encode_us": round(statistics.median(self.encode_s) * 1e6, 1),
            "least_encode_us": round(min(self.encode_s) * 1e6, 1),
            "decode_us": round(statistics.median(self.decode_s) * 1e6, 1),
            "least_decode_us": round(min(self.decode_s) * 1e6, 1),
            "bytes_a_row_and_layer": round((traffic.bytes_in + traffic.bytes_out) / rows / layers, 1),
            "calls_a_layer_and_step": round(2 * traffic.calls / (len(self.encode_s) + len(self.decode_s)), 4),
        }


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx worker", description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--layers", default="0,29")
    parser.add_argument("--scheme", default="perm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--outputs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    logging.getLogger("engine").setLevel(logging.ERROR)
    batch, outputs = options.batch, options.outputs
    scx = {"scx_layers": options.layers, "scx_scheme": options.scheme}
    contenders = {
        "plain": Contender(options.model, batch), "in this process": Contender(options.model, batch, **scx),
        "worker": Contender(options.model, batch, scx_secure_device="worker", **scx),
    }  # fmt: skip
    try:
        for number in range(options.rounds + 1):
            for contender in contenders.values():
                contender.run(batch, outputs if number else 4)  # the first one warms up
                contender.best_tps *= number > 0
        spec = contenders["plain"].llm.spec
        rows = batch * (PROMPT_TOKENS + 3 + options.rounds * (PROMPT_TOKENS + outputs - 1))
        layers = len(contenders["worker"].secure.config.layers)
        runner: Any = contenders["plain"].llm.engine.executor.runner  # type: ignore[attr-defined]
        item = runner.store.geometry.element_bytes
        found: dict[str, Any] = {
            "batch": batch, "outputs": outputs, "layers": options.layers, "scheme": options.scheme,
            "formula_bytes_a_row_and_layer": item * 4 * (spec.heads + spec.kv_heads) * spec.head_dim,
        }  # fmt: skip
        for name, contender in contenders.items():
            found[name] = {"tokens_a_second": round(contender.best_tps, 1)}
            if contender.secure is not None:
                found[name] |= contender.facts(layers, rows)
            print(f"{name:16}" + ", ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
        print(json.dumps(found))
    finally:
        for contender in contenders.values():
            contender.llm.close()
    return 0
