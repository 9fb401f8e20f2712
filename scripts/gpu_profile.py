"""Where a decode step's time goes on a GPU: `python -m scripts.gpu_profile [--sequences 1,64,256] [--json FILE]`.

A Llama-3-8B shape with random weights decodes for so many sequences under PyTorch's profiler: the part of the time in
which no kernel runs, and the kernels that take the rest. Throughput is measured by scripts.bench, without a profiler.
"""

from __future__ import annotations

import argparse
import json
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
from scripts.benching.shapes import write_folder
from scripts.gpu_steps import kernels_of, show_kernels


def idle(engine: EngineLoop, sequences: int, steps: int = 40) -> dict[str, Any]:
    """Where a step's time goes while `sequences` decode: see gpu_steps.kernels_of."""
    from torch.profiler import ProfilerActivity, profile

    for i in range(sequences):
        params = SamplingParams(temperature=0.0, max_tokens=4 * steps, ignore_eos=True)
        engine.add(Request(f"idle{i}", tuple(range(3, 131)), params, 0.0))
    while engine.scheduler.queues.waiting or engine.scheduler.totals["outputs"] < sequences:
        engine.step()
    for _ in range(10):
        engine.step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        start = perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = perf_counter() - start
        torch.cuda.synchronize()
    for i in range(sequences):
        engine.abort(f"idle{i}")
    while engine.has_work:
        engine.step()
    return {"ms_per_step": round(seconds / steps * 1e3, 3), **kernels_of(seen, steps)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, profile, write after each number of sequences."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_profile", description=__doc__)
    parser.add_argument("--sequences", default="1,64,256")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)
    record: dict[str, Any] = heading("gpu_profile", f"decode steps of {args.sequences} sequences", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder("llama3-8b", Path(scratch))
        start = perf_counter()
        config = EngineConfig(model=str(folder), device="cuda", load_format="dummy", max_model_len=4096,
                              max_num_seqs=256, attention_backend=args.attention_backend,
                              enforce_eager=args.enforce_eager)  # fmt: skip
        engine = build_engine(config)
        record["startup_s"] = round(perf_counter() - start, 2)
        print(f"built in {record['startup_s']:.1f} s", flush=True)
        for sequences in map(int, args.sequences.split(",")):
            record[f"{sequences} sequences"] = found = idle(engine, sequences)
            print(f"{sequences} sequences: {found['ms_per_step']} ms a step, no kernel runs in "
                  f"{found['idle_percent']} % of it")  # fmt: skip
            show_kernels(found["kernels"])
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        engine.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
