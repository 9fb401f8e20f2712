"""The whole engine on a GPU, offline: a Llama-3-8B shape with random weights through the workloads of the peer.

`python -m scripts.gpu_engine [--workload single,decode_heavy,chat,long] [--json FILE]`. Greedy, fixed output lengths,
prefix cache off. idle1, idle64, ... profile so many decoding sequences. The JSON is written after each workload; the
last line is one JSON object. scripts.gpu_correctness says whether what is measured is right.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
Workload = list[tuple[float, int, int]]


def workloads(name: str) -> Workload:
    """(arrival_s, prompt tokens, output tokens) of each request; offline ones arrive at once."""
    import numpy as np

    if name == "single":
        return [(0.0, 512, 256)]
    if name == "decode_heavy":
        return [(0.0, 128, 512)] * 256
    if name == "long":
        return [(0.0, 8192, 128)] * 64
    rng = np.random.default_rng(1)
    prompts = np.clip(rng.lognormal(5.0, 1.0, 1000), 8, 2048).astype(int)
    outputs = np.clip(rng.lognormal(5.2, 0.8, 1000), 8, 1024).astype(int)
    return [(0.0, int(a), int(b)) for a, b in zip(prompts, outputs, strict=True)]


def run(engine: EngineLoop, work: Workload) -> dict[str, Any]:
    """All requests at once, to the end."""
    generator = torch.Generator().manual_seed(0)
    for i, (_, prompt, outputs) in enumerate(work):
        ids = torch.randint(0, 128000, (prompt,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        engine.add(Request(f"{i}", tuple(ids), params, 0.0))
    torch.cuda.synchronize()
    start, steps, made = perf_counter(), 0, 0
    while engine.has_work:
        for update in engine.step():
            made += len(update.tokens)
            assert update.finish_reason in (None, "length"), update
        steps += 1
    torch.cuda.synchronize()
    seconds = perf_counter() - start
    wanted, prompts = sum(o for _, _, o in work), sum(p for _, p, _ in work)
    assert made == wanted, (made, wanted)
    return {
        "seconds": seconds, "steps": steps, "out_tok_s": made / seconds, "total_tok_s": (made + prompts) / seconds,
        "ms_per_step": seconds / steps * 1e3,
    }  # fmt: skip


def idle(engine: EngineLoop, sequences: int, steps: int = 40) -> dict[str, Any]:
    """Where a step's time goes while `sequences` decode: per cent of the time in which no kernel ran, the kernels that
    took most of the rest (per cent, calls a step), and the host's time to plan and launch a step in milliseconds."""
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
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in seen.events()
                     if e.device_type == torch.autograd.DeviceType.CUDA)  # fmt: skip
    for i in range(sequences):
        engine.abort(f"idle{i}")
    while engine.has_work:
        engine.step()
    busy, reached = 0.0, kernels[0][0]
    share: dict[str, tuple[float, int]] = {}  # kernel -> microseconds, calls
    for begin, end, name in kernels:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        total, calls = share.get(name, (0.0, 0))
        share[name] = (total + end - begin, calls + 1)
    span = reached - kernels[0][0]
    top = sorted(share.items(), key=lambda item: -item[1][0])[:12]
    return {
        "idle_percent": round(100 * (1 - busy / span), 2), "ms_per_step": round(seconds / steps * 1e3, 3),
        "kernels": {name[:60]: [round(100 * us / span, 1), round(n / steps, 1)] for name, (us, n) in top},
    }  # fmt: skip


def main() -> None:
    """Build, run, write."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_engine", description=__doc__)
    parser.add_argument("--workload", default="single,idle1,idle64,decode_heavy,chat")
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA3_8B))
        start = perf_counter()
        engine = build_engine(
            EngineConfig(
                model=folder,
                device="cuda",
                load_format="dummy",
                max_model_len=16384,
                max_num_seqs=512,
                chunk_tokens=args.chunk_tokens,
                attention_backend=args.attention_backend,
                enforce_eager=args.enforce_eager,
            )
        )
        record["startup_s"] = perf_counter() - start
        print(f"built in {record['startup_s']:.1f} s; {engine.stats()['kv_groups_total']} groups", flush=True)
        for name in args.workload.split(","):
            if name.startswith("idle"):
                record[name] = idle(engine, int(name.removeprefix("idle")))
            else:
                run(engine, workloads(name)[:8])
                record[name] = run(engine, workloads(name))
            print(name, json.dumps(record[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        engine.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
