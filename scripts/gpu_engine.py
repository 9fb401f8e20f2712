"""The whole engine on a GPU, offline: a Llama-3-8B shape with random weights through the workloads of the peer.

`python -m scripts.gpu_engine [--workload single,decode_heavy,chat,long] [--json FILE]`. Greedy, fixed output lengths,
prefix cache off. `check` compares a tiny random checkpoint with transformers first. The last line is one JSON object.
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


def check() -> str:
    """Greedy tokens of a tiny random Llama in float32 against transformers, TF32 off, through graphs and chunks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    judge = LlamaForCausalLM(config).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        judge.save_pretrained(folder)
        judge = judge.cuda()
        results = []
        for settings in ({}, {"enforce_eager": True}, {"kv_layout": "per_layer"}, {"chunk_tokens": 7}):
            engine = build_engine(
                EngineConfig(model=folder, dtype="float32", kv_pool_bytes=1 << 30, max_num_seqs=16, **settings)
            )
            prompts = [[(7 * i + j * j) % 512 for j in range(1 + 13 * i)] for i in range(16)]
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
            out: dict[str, list[int]] = {}
            for i, prompt in enumerate(prompts):
                engine.add(Request(f"{i}", tuple(prompt), params, 0.0))
                out[f"{i}"] = []
            while engine.has_work:
                for update in engine.step():
                    out[update.request_id] += update.tokens
            engine.close()
            wrong = 0
            for i, prompt in enumerate(prompts):
                with torch.inference_mode():
                    ids = torch.tensor([[*prompt, *out[f"{i}"][:-1]]], device="cuda")
                    best = judge(ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
                wrong += sum(a != b for a, b in zip(best, out[f"{i}"], strict=True))
            results.append(f"{settings}: {wrong} wrong of {24 * 16}")
    return "; ".join(results)


def main() -> None:
    """Check, build, run."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_engine", description=__doc__)
    parser.add_argument("--workload", default="single,decode_heavy,chat")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if not args.no_check:
        record["check"] = check()
        print("check:", record["check"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA3_8B))
        start = perf_counter()
        engine = build_engine(
            EngineConfig(
                model=folder, load_format="dummy", max_model_len=16384, max_num_seqs=512, chunk_tokens=args.chunk_tokens
            )
        )
        record["startup_s"] = perf_counter() - start
        print(f"built in {record['startup_s']:.1f} s; {engine.stats()['kv_groups_total']} groups", flush=True)
        for name in args.workload.split(","):
            run(engine, workloads(name)[:8])
            record[name] = run(engine, workloads(name))
            print(name, json.dumps(record[name]), flush=True)
        engine.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
