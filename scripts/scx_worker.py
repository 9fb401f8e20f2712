"""What does a secure worker cost? The steps of `overhead`, plain, with keys in this process and with keys in a worker.

    python -m scripts.scx worker [--model DIR] [--layers 0,29] [--scheme perm] [--batch 16] [--rounds 10]

Beside a step's milliseconds: microseconds of an encode (with the slab's writes) and of a decode, median and least; what
crossed in both directions for a row and encoded layer, beside the formula (engine/scx/schemes.py: row_bytes); and calls
for an encoded layer and step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from engine.loading.resolve import resolve_model
from engine.scx.schemes import row_bytes
from scripts.scx_overhead import CHUNK_TOKENS, Runner, run


class Stages:
    """The calls of one engine's secure side, timed."""

    def __init__(self, runner: Runner) -> None:
        executor: Any = runner.engine.executor
        self.secure = executor.runner.scx.scx.secure
        self.rows = 0
        self.encode_us: list[float] = []
        self.decode_us: list[float] = []
        self.secure.encode_store = self._timed(self.secure.encode_store, self.encode_us, 1)
        self.secure.decode = self._timed(self.secure.decode, self.decode_us, 0)

    def _timed(self, call: Callable[..., torch.Tensor], into: list[float], counts: int) -> Callable[..., torch.Tensor]:
        def timed(layer: int, rows: torch.Tensor, *others: Any) -> torch.Tensor:
            self.rows += counts * rows.shape[0]
            before_s = perf_counter()
            found = call(layer, rows, *others)
            into.append(1e6 * (perf_counter() - before_s))
            return found

        return timed

    def facts(self) -> dict[str, float]:
        """See the module."""
        traffic = self.secure.traffic
        return {
            "encode_us": round(statistics.median(self.encode_us), 1), "least_encode_us": round(min(self.encode_us), 1),
            "decode_us": round(statistics.median(self.decode_us), 1), "least_decode_us": round(min(self.decode_us), 1),
            "bytes_a_row_and_layer": (traffic.bytes_in + traffic.bytes_out) / self.rows,
            "calls_a_layer_and_step": traffic.calls / len(self.encode_us),
        }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx worker", description=__doc__)
    parser.add_argument("--model", help="a folder; SmolLM2-135M-Instruct without it")
    parser.add_argument("--layers", default="0,29")
    parser.add_argument("--scheme", default="perm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(argv)
    logging.getLogger("engine").setLevel(logging.ERROR)
    common = {"model": str(resolve_model(options.model)), "dtype": options.dtype, "max_num_seqs": options.batch,
              "max_model_len": 4 * CHUNK_TOKENS, "kv_pool_bytes": 1 << 30, "chunk_tokens": CHUNK_TOKENS}  # fmt: skip
    scx = {"scx_layers": options.layers, "scx_scheme": options.scheme}
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "in this process": scx,
                                        "worker": {**scx, "scx_secure_device": "worker"}}  # fmt: skip
    runners = [Runner(name, {**common, **settings}) for name, settings in kinds.items()]
    try:
        stages = {runner.name: Stages(runner) for runner in runners[1:]}
        run(runners, options.rounds, options.batch)
        shape = stages["worker"].secure.shape
        item = getattr(torch, options.dtype).itemsize
        found: dict[str, Any] = {
            "batch": options.batch, "layers": options.layers, "scheme": options.scheme,
            "formula_bytes_a_row_and_layer": sum(
                row_bytes(options.scheme, shape.heads, shape.kv_heads, shape.head_dim, item)),
        }  # fmt: skip
        for runner in runners:
            ms = {work: round(statistics.median(times), 3) for work, times in runner.fastest_ms.items()}
            found[runner.name] = {"decode_ms": ms["decode"], "prefill_ms": ms["prefill"],
                                  "decoded_tokens_a_second": round(1e3 * options.batch / ms["decode"], 1)}  # fmt: skip
            if runner.name in stages:
                found[runner.name] |= stages[runner.name].facts()
            print(f"{runner.name:16}" + ", ".join(f"{key} {value}" for key, value in found[runner.name].items()))
    finally:
        for runner in runners:
            runner.engine.close()
    print(json.dumps(found))
    return 0
