"""Does encoding change what a model knows? Perplexity and a cloze task, plain against each scheme.

    python -m scripts.scx accuracy [--corpus FILE.jsonl] [--layers all] [--schemes perm,rotate,mix] [--json FILE]

Without --corpus the text is Python's own language reference, which every Python carries. Perplexity: of each document's
first tokens, each after those before it. Cloze: the last word of a passage that has said it before, as in LAMBADA; the
passage goes through engine.LLM as a prompt and its greedy answer must begin with that word. Intervals are 95 %, by
bootstrap over documents or passages; differences are of the same documents and passages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import LLM, SamplingParams
from engine.core.errors import ConfigError
from scripts.benching.environment import environment
from scripts.scx_scoring import score

DRAWS = 2000
ANSWER_TOKENS = 8
PASSAGE_WORDS = (30, 90)  # as LAMBADA's, about
LEAST_LETTERS = 4


@dataclass(frozen=True, slots=True)
class Cloze:
    """A passage without its last word, and that word."""

    passage: str
    word: str


@dataclass(slots=True)
class Result:
    """One engine's figures. nats, tokens: of each document; right: of each passage; answers: its first words."""

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray
    answers: list[str]
    seconds: float


def python_reference() -> list[str]:
    """The topics of Python's language reference, as `help()` has them."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def read_corpus(path: Path) -> list[str]:
    """The texts of a JSON-lines file, {"text": ...} each, as scripts.corpora writes them. Raises ConfigError."""
    try:
        return [str(json.loads(line)["text"]) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--corpus {path}: {type(error).__name__}; it has no line of JSON with a text") from None


def clozes(texts: Sequence[str], count: int) -> list[Cloze]:
    """At most one passage a text: whole sentences, the last word of at least four letters and said before in the
    passage, so that a reader can know it. In the order of the texts."""
    found = []
    for text in texts:
        passage = _passage(" ".join(text.split()))
        if passage is not None:
            found.append(passage)
        if len(found) == count:
            break
    return found


def _passage(text: str) -> Cloze | None:
    """The first fitting run of sentences of a text."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    for first in range(len(sentences)):
        words: list[str] = []
        for sentence in sentences[first:]:
            words += sentence.split(" ")
            if len(words) > PASSAGE_WORDS[1]:
                break
            last = words[-1].rstrip(".!?")
            said = {word.strip(".,;:()\"'").lower() for word in words[:-1]}
            fits = len(words) >= PASSAGE_WORDS[0] and last.isalpha() and len(last) >= LEAST_LETTERS
            if fits and last.lower() in said:
                return Cloze(" ".join(words[:-1]), last)
    return None


def measure(llm: LLM, documents: Sequence[Sequence[int]], passages: Sequence[Cloze], label: str) -> Result:
    """Both tasks on one engine."""
    began = perf_counter()
    nats = [-float(score(llm, tokens).logprobs.sum()) for tokens in tqdm(documents, desc=label, disable=None)]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    done = llm.generate([cloze.passage for cloze in passages], params, use_tqdm=False)
    answers = [first_word(result.outputs[0].text) for result in done]
    right = [answer.lower() == cloze.word.lower() for answer, cloze in zip(answers, passages, strict=True)]
    tokens = [len(each) - 1 for each in documents]
    return Result(np.array(nats), np.array(tokens), np.array(right), answers, perf_counter() - began)


def first_word(text: str) -> str:
    """The letters that an answer begins with."""
    found = re.match(r"\s*([A-Za-z]+)", text)
    return found[1] if found else ""


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of drawn values, 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def draws(count: int) -> np.ndarray:
    """(DRAWS, count) bootstrap indices, the same for every engine."""
    drawn: np.ndarray = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    return drawn


def facts(mine: Result, plain: Result) -> dict[str, Any]:
    """Figures with intervals, and the differences from plain on the same texts. bits: of a token."""
    chosen, picked = draws(len(mine.nats)), draws(len(mine.right))
    bits = mine.nats[chosen].sum(1) / mine.tokens[chosen].sum(1) / math.log(2)
    other = plain.nats[chosen].sum(1) / plain.tokens[chosen].sum(1) / math.log(2)
    mean, plain_mean = (float(one.nats.sum() / one.tokens.sum()) for one in (mine, plain))
    gained, lost = int((mine.right & ~plain.right).sum()), int((plain.right & ~mine.right).sum())
    return {
        "perplexity": math.exp(mean), "perplexity_interval": interval(2.0**bits),
        "bits_a_token_over_plain": (mean - plain_mean) / math.log(2),
        "bits_over_plain_interval": interval(bits - other),
        "cloze": float(mine.right.mean()), "cloze_interval": interval(mine.right[picked].mean(1)),
        "cloze_over_plain": float(mine.right.mean() - plain.right.mean()),
        "cloze_over_plain_interval": interval(mine.right[picked].mean(1) - plain.right[picked].mean(1)),
        "cloze_gained": gained, "cloze_lost": lost,
        "same_answers": float(np.mean([a == b for a, b in zip(mine.answers, plain.answers, strict=True)])),
        "seconds": mine.seconds,
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure, print, write. 2 and one line for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx accuracy", description=__doc__)
    parser.add_argument("--model", default=None, help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    parser.add_argument("--corpus", type=Path, help="JSON lines with a text each; without it, see above")
    parser.add_argument("--documents", type=int, default=60, help="of which perplexity is taken")
    parser.add_argument("--tokens", type=int, default=512, help="of each document, from its start")
    parser.add_argument("--passages", type=int, default=200, help="of the cloze task, one a document")
    parser.add_argument("--layers", default="all", help="encoded ones, as --scx-layers")
    parser.add_argument("--schemes", default="perm,rotate,mix")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args(argv)
    logging.getLogger("engine").setLevel(logging.ERROR)
    try:
        return _measure(args)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    texts = read_corpus(args.corpus) if args.corpus else python_reference()
    passages = clozes(texts, args.passages)
    results: dict[str, Result] = {}
    settings = {"dtype": args.dtype, "device": args.device, "max_model_len": max(1024, args.tokens),
                "max_num_seqs": 16} | ({"kv_pool_bytes": 1 << 30} if args.device == "cpu" else {})  # fmt: skip
    documents: list[list[int]] = []
    for scheme in ("plain", *(name.strip() for name in args.schemes.split(",") if name.strip())):
        scx = {"scx_layers": ""} if scheme == "plain" else {"scx_layers": args.layers, "scx_scheme": scheme}
        with LLM(args.model, **settings, **scx) as llm:
            if not documents:
                cut = [llm.tokenizer.encode(text)[: args.tokens] for text in texts]
                documents = [tokens for tokens in cut if len(tokens) >= args.tokens // 2][: args.documents]
                if not documents or not passages:
                    raise ConfigError(f"{len(texts)} texts have {len(documents)} documents of {args.tokens // 2} "
                                      f"tokens and {len(passages)} passages; both are needed")
            results[scheme] = measure(llm, documents, passages, scheme)
        found = facts(results[scheme], results["plain"])
        print(line(scheme, found), flush=True)
    record = {
        "workload": f"scx-accuracy-{args.corpus.stem if args.corpus else 'python-reference'}",
        "model": args.model or "SmolLM2-135M-Instruct", "dtype": args.dtype, "device": args.device,
        "layers": args.layers, "documents": len(documents),
        "tokens": int(results["plain"].tokens.sum()), "passages": len(passages),
        "environment": environment("scx", sys.argv[1:]),
        "schemes": {name: facts(result, results["plain"]) for name, result in results.items()},
    }  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0


def line(scheme: str, found: dict[str, Any]) -> str:
    """One row for people."""
    (low, high), (below, above) = found["perplexity_interval"], found["cloze_interval"]
    text = (f"{scheme:12} perplexity {found['perplexity']:7.3f} [{low:.3f}, {high:.3f}]  "
            f"cloze {100 * found['cloze']:5.1f} % [{100 * below:.1f}, {100 * above:.1f}]")
    if scheme == "plain":
        return text
    low, high = found["bits_over_plain_interval"]
    same = f"+{found['cloze_gained']} -{found['cloze_lost']} passages, {100 * found['same_answers']:.1f} % same answers"
    return f"{text}  bits over plain {found['bits_a_token_over_plain']:+.5f} [{low:+.5f}, {high:+.5f}]  {same}"
