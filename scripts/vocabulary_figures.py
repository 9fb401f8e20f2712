"""The figures of the vocabulary experiment, of models that are there: `figures(models, documents, ...)`.

Bits per byte by document, so that two models are compared on the same texts; characters a second through the engine
as its users run it; everything else is counting. It trains nothing and draws nothing.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.core.clock import MonotonicClock
from engine.core.errors import ConfigError
from engine.core.request import SamplingParams
from engine.patching.train_data import batched
from engine.tokenization import load_tokenizer
from scripts.benching.environment import environment

CONTEXT = 512
RUNS, PROMPT_CHARS, ANSWER_CHARS = 5, 600, 560
REQUESTS = {"cpu": 32, "cuda": 256}
"""At once. A GPU is given enough of them to be busy."""
ENGINE: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"kv_pool_bytes": 12 << 30, "max_num_seqs": 256,
                                                         "chunk_tokens": 4096}}  # fmt: skip
"""Settings of both engines, which are in memory together."""
PARTS = ("bits", "serving", "samples")
RESAMPLES = 2_000
SCORED_TOGETHER = 512
"""Documents that are encoded and scored between two moves of the bar."""


def figures(models: dict[str, Path], documents: list[str], openings: tuple[str, ...], device: str,
            parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """Bits per byte of every model, serving of the two tuned ones, samples; docs/experiments/adaptivocab.md says what
    each means. models: "untouched", "plain, tuned", "patched, not tuned", "patched, tuned". documents: held out.
    parts: which of the three."""
    tuned = {name: models[name] for name in ("plain, tuned", "patched, tuned")}
    found: dict[str, Any] = {
        "environment": environment("vocabulary_experiment", sys.argv[1:]),
        "device": device,
        "training": {name: training_facts(path) for name, path in tuned.items()},
    }
    if "serving" in parts:
        found["serving"] = serve(tuned, prompts_of(documents, REQUESTS[device]), models["untouched"], device)
    if "bits" in parts:
        found["bits_per_byte"] = compare({name: score(path, documents, device) for name, path in models.items()},
                                         documents)  # fmt: skip
    if "samples" in parts:
        found["samples"] = {name: greedy(path, openings, device) for name, path in models.items()}
    return found


def prompts_of(documents: list[str], count: int) -> list[str]:
    """Pieces of PROMPT_CHARS characters at most, between words: the documents' openings, then what stands further in,
    each piece followed by as much that is left out. Raises ConfigError when the documents do not hold `count`."""
    found: list[str] = []
    longest = max(map(len, documents), default=0)
    for begin in range(0, longest, 2 * PROMPT_CHARS):
        pieces = (text[begin : begin + PROMPT_CHARS] for text in documents)
        found += [piece[piece.find(" ") + 1 if begin else 0 : piece.rfind(" ")] for piece in pieces
                  if len(piece) == PROMPT_CHARS and len(piece.split()) > 2]  # fmt: skip
        if len(found) >= count:
            return found[:count]
    raise ConfigError(f"{len(documents)} held-out documents have {len(found)} pieces of {PROMPT_CHARS} characters; "
                      f"{count} requests are wanted")


def training_facts(folder: Path) -> dict[str, Any]:
    """Settings and course of the fine-tuning: held-out bits per byte, and those of the training text by pass."""
    found = json.loads((folder / "training" / "run.json").read_text("utf-8"))
    with (folder / "training" / "loss.csv").open(encoding="utf-8", newline="") as file:
        bits = [float(row["bits_per_byte"]) for row in csv.DictReader(file)]
    facts = {key: found[key] for key in ("settings", "steps", "documents", "corpus_tokens", "corpus_utf8_bytes",
                                         "learning_parameters", "evaluations")}  # fmt: skip
    return {**facts, "training_bits_per_byte_of_passes": means_of_passes(bits, found["settings"]["epochs"])}


def means_of_passes(values: list[float], passes: float) -> list[float]:
    """The mean over the updates of each pass. passes: of the whole; the last one may be cut."""
    updates = max(1, round(len(values) / passes))
    return [statistics.fmean(values[begin : begin + updates]) for begin in range(0, len(values), updates)]


def score(model: Path, documents: list[str], device: str) -> list[float]:
    """Bits of each document under the model, scored whole, from its first token on, products in bfloat16."""
    from engine.patching import train_step

    tokenizer = load_tokenizer(model)
    network = train_step.load_model(model, device)
    bits: list[float] = []
    with tqdm(desc=f"scoring {model.name}", total=len(documents), unit="doc") as bar:
        for some in batched(documents, SCORED_TOGETHER):
            ids = tokenizer.encode_batch(some, False)
            nats = train_step.document_nats(network, ids, CONTEXT, tokenizer.eos_ids[0], True)
            bits += [value / math.log(2) for value in nats]
            bar.update(len(some))
    return bits


def compare(scores: dict[str, list[float]], documents: list[str]) -> dict[str, Any]:
    """Bits per byte of each model, and the patched one over the plain one, with 95 % intervals over documents."""
    sizes = np.array([len(text.encode()) for text in documents])
    rows = {name: np.array(bits) for name, bits in scores.items()}
    draws = np.random.default_rng(0).integers(0, len(sizes), (RESAMPLES, len(sizes)))
    found: dict[str, Any] = {"documents": len(sizes), "utf8_bytes": int(sizes.sum())}
    for name, bits in rows.items():
        found[name] = interval(bits.sum() / sizes.sum(), bits[draws].sum(1) / sizes[draws].sum(1))
    patched, plain = rows["patched, tuned"], rows["plain, tuned"]
    found["patched over plain"] = interval(patched.sum() / plain.sum(), patched[draws].sum(1) / plain[draws].sum(1))
    return found


def interval(value: float, resampled: Any) -> dict[str, float]:
    """A figure with its 95 % bootstrap interval."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


class Served:
    """One model in this process's engine, and the same wish in its own tokens: ANSWER_CHARS characters a prompt."""

    def __init__(self, model: Path, prompts: list[str], device: str) -> None:
        from engine import LLM

        self.llm = LLM(str(model), max_model_len=1024, device=device, **ENGINE[device])
        self.prompts = prompts
        pilot = self._run(128)
        self.tokens = max(1, round(ANSWER_CHARS * pilot["output_tokens"] / pilot["output_chars"]))
        self.runs: list[dict[str, Any]] = []

    def _run(self, tokens: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=tokens, ignore_eos=True, seed=1)
        clock = MonotonicClock()
        began_s = clock.now_s()
        results = self.llm.generate(self.prompts, params, use_tqdm=False)
        seconds = clock.now_s() - began_s
        texts = [result.outputs[0].text for result in results]
        return {"seconds": seconds, "output_chars": sum(map(len, texts)),
                "prompt_tokens": sum(len(result.prompt_token_ids) for result in results),
                "output_tokens": sum(len(result.outputs[0].token_ids) for result in results), "texts": texts}

    def run(self) -> None:
        """One measured run."""
        self.runs.append(self._run(self.tokens))

    def facts(self, base: Path) -> dict[str, Any]:
        """Medians over the runs, and what one character costs."""
        last = self.runs[-1]
        spec, element_bytes = self.llm.spec, 2 if self.llm.config.dtype != "float32" else 4
        token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * element_bytes
        prompt_chars = sum(map(len, self.prompts))
        base_tokens, own_tokens = (sum(map(len, tokenizer.encode_batch(last["texts"], False)))
                                   for tokenizer in (load_tokenizer(base), self.llm.tokenizer))  # fmt: skip
        speeds = [run["output_chars"] / run["seconds"] for run in self.runs]
        both = [(run["output_chars"] + prompt_chars) / run["seconds"] for run in self.runs]
        return {
            "output_tokens_a_request": self.tokens, "runs": [{k: v for k, v in run.items() if k != "texts"}
                                                             for run in self.runs],
            "output_chars_per_s": statistics.median(speeds), "output_chars_per_s_of_runs": speeds,
            "all_chars_per_s": statistics.median(both),
            "tokens_per_char_in": last["prompt_tokens"] / prompt_chars,
            "tokens_per_char_out": last["output_tokens"] / last["output_chars"],
            "rho_out": last["output_tokens"] / base_tokens,
            "emitted_over_encoded": last["output_tokens"] / own_tokens,
            "encoded_over_base": own_tokens / base_tokens,
            "kv_bytes_per_char": token_bytes * (last["prompt_tokens"] + last["output_tokens"])
            / (prompt_chars + last["output_chars"]),
        }  # fmt: skip


def serve(models: dict[str, Path], prompts: list[str], base: Path, device: str) -> dict[str, Any]:
    """The same prompts through each, runs alternating, both engines in memory all the time."""
    served = {name: Served(path, prompts, device) for name, path in models.items()}
    for _ in tqdm(range(RUNS), desc="serving", unit="run"):
        for each in served.values():
            each.run()
    found: dict[str, Any] = {name: each.facts(base) for name, each in served.items()}
    plain, patched = (found[name]["output_chars_per_s_of_runs"] for name in ("plain, tuned", "patched, tuned"))
    ratios = [ours / theirs for ours, theirs in zip(patched, plain, strict=True)]
    found["patched over plain, of runs"] = ratios
    found["patched over plain"] = statistics.median(ratios)
    found |= {"requests": len(prompts), "prompt_chars": sum(map(len, prompts))}
    for each in served.values():
        each.llm.close()
    return found


def greedy(model: Path, openings: tuple[str, ...], device: str) -> list[str]:
    """What the model says after each opening."""
    from engine import LLM

    with LLM(str(model), max_model_len=256, device=device) as llm:
        results = llm.generate(list(openings), SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    return [result.outputs[0].text for result in results]
