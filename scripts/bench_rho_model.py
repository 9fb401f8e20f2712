"""The question of scripts/bench_rho.py on a real model: same texts, memory and risk, rho known and rho = 1.

    python -m scripts.bench_rho_model --model PATCHED_MODEL --text held-out.jsonl [--requests 48] [--out FILE.json]

A first run, with room for everyone, samples the outputs and counts them in both vocabularies: that is the history of
the earlier deployment, in base tokens, and rho of the output side. Then each arm serves the same requests again with
the same seeds and a tight pool, alternating, and the repeat that took the least processor time counts (on a machine
that others share, wall time says little). Every arm must give the first run's tokens; exit status 1 if one does not.
The model need not be trained: what matters is that outputs end by themselves before max_tokens, which stop ids see to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import LLM, SamplingParams
from engine.core.clock import MonotonicClock
from engine.core.demand import RhoStatistics
from engine.patching.corpus import read_documents
from engine.patching.reduction import LENGTHS, SHA256, STATISTICS_OUT
from engine.patching.report import statistics as rho_statistics
from engine.serve.text_worker import count_both
from scripts.benching.environment import environment

DOMAIN = "first_run"
STOP_EVERY = 61  # every so manieth id ends an output, so that lengths spread
ARMS = ("rho = 1", "rho known", "no forecast")


Outputs = list[list[int]]


def serve(options: argparse.Namespace, prompts: Outputs, **settings: Any) -> tuple[Outputs, dict[str, float]]:
    """The outputs' ids, and what it took."""
    stops = tuple(range(STOP_EVERY, options.vocab, STOP_EVERY))
    params = [SamplingParams(max_tokens=options.max_tokens, temperature=1.0, seed=index, stop_token_ids=stops)
              for index in range(len(prompts))]
    with LLM(options.model, dtype=options.dtype, max_model_len=1024, kv_page_bytes=options.page_bytes,
             max_num_seqs=options.requests, **settings) as llm:  # fmt: skip
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0.0), use_tqdm=False)
        llm.engine.take_records()
        clock = MonotonicClock()
        begin_s, begin_cpu_s = clock.now_s(), time.process_time()
        results = llm.generate(prompts, params, use_tqdm=False)
        wall_s, cpu_s = clock.now_s() - begin_s, time.process_time() - begin_cpu_s
        records = llm.engine.take_records()
        text = sum(len(result.outputs[0].text) for result in results)
        waiting = [record.running for record in records if record.waiting]
        figures = {
            "running": statistics.fmean(waiting or [0]), "characters_per_s": text / wall_s, "wall_s": wall_s,
            "cpu_s": cpu_s, "characters_per_cpu_s": text / cpu_s,
            "preemptions": float(llm.engine.stats()["preempted_total"]), "steps": float(len(records)),
            "steps_with_a_queue": float(len(waiting)),
        }  # fmt: skip
        return [result.outputs[0].token_ids for result in results], figures


def first_run(options: argparse.Namespace, tokenizer: Any, prompts: Outputs) -> tuple[Outputs, dict[str, Any]]:
    """Outputs of every request, and the file of figures that the arm `rho known` gets."""
    outputs, _ = serve(options, prompts, kv_pool_bytes=options.pool_bytes * 8)
    counted = [count_both(tokenizer, ids) for ids in outputs]
    characters = [len(tokenizer.decode(ids)) for ids in outputs]
    base, own = (np.array([getattr(one, name) for one in counted]) for name in ("base", "own"))
    figures = rho_statistics(base, own, np.array(characters), tokenizer.base.max_token_bytes, "")
    RhoStatistics.of(DOMAIN, figures)
    return outputs, {STATISTICS_OUT: {DOMAIN: figures}, LENGTHS: base.tolist(), SHA256: tokenizer.artefact.sha256}


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="bench_rho_model", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of a patched model")
    add("--text", type=Path, required=True, help=".jsonl of texts; prompts are their beginnings")
    add("--requests", type=int, default=32)
    add("--repeats", type=int, default=2)
    add("--prompt-tokens", type=int, default=64, help="engine tokens of a prompt at most")
    add("--max-tokens", type=int, default=128)
    add("--risk", type=float, default=1e-3)
    add("--pool-bytes", type=int, default=64 << 20)
    add("--page-bytes", type=int, default=128 << 10)
    add("--dtype", default="float32", help="float32: tokens do not depend on who else is in the batch")
    add("--out", type=Path)
    options = parser.parse_args(arguments)
    from engine.tokenization import load_tokenizer

    tokenizer: Any = load_tokenizer(options.model)
    options.vocab = tokenizer.vocab_size
    texts = [text for text, _ in zip(read_documents([options.text]), range(options.requests))]
    prompts = [tokenizer.encode(text)[:options.prompt_tokens] for text in texts]
    truth, known = first_run(options, tokenizer, prompts)
    arms: dict[str, dict[str, float]] = {}
    same = True
    with tempfile.TemporaryDirectory() as scratch:
        for arm in ARMS * options.repeats:
            file = Path(scratch) / "figures.json"
            file.write_text(json.dumps(known if arm == "rho known" else {LENGTHS: known[LENGTHS]}))
            extra = {} if arm == "no forecast" else {
                "admission_risk": options.risk, "token_reduction": str(file),
                **({"token_reduction_domain": DOMAIN} if arm == "rho known" else {})}
            tokens, row = serve(options, prompts, kv_pool_bytes=options.pool_bytes, **extra)
            same &= tokens == truth
            arms[arm] = min(arms.get(arm, row), row, key=lambda one: one["cpu_s"])
    figures = known[STATISTICS_OUT][DOMAIN]
    print(f"rho out {figures['rho']:.3f}, se {figures['se']:.3f}; every arm gave the same tokens: {same}")
    print(f"{'':14}{'running':>9}{'preemptions':>13}{'steps':>8}{'characters/CPU s':>18}{'CPU s':>8}{'wall s':>8}")
    for arm, row in arms.items():
        print(f"{arm:14}{row['running']:9.1f}{row['preemptions']:13.0f}{row['steps']:8.0f}"
              f"{row['characters_per_cpu_s']:18.0f}{row['cpu_s']:8.1f}{row['wall_s']:8.1f}")
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("out", "model", "text")}
    result = {"benchmark": "rho on a model", "settings": settings, "rho_out": figures, "same_tokens": same,
              "arms": arms, "environment": environment("bench_rho_model", sys.argv[1:])}  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
