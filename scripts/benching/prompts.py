"""prompts: texts of an exact number of tokens under a model's tokenizer, one file each, for programs that take text.

Sentences of plain English in a seeded order, cut at a word, and filled up with short words until the count is exact.
This package's own benchmarks send token ids, which have the right number by themselves.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.loading.resolve import resolve_model
from scripts.benching.scx import lengths
from scripts.scx_attacks.text import PASSAGES

FILLERS = (" a", " so", " of", ".", " 1", "\n")
MARGIN_TOKENS = 12  # left for fillers: cutting between two tokens may change those beside the cut


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    parser.add_argument("--model", default=None, help="whose tokenizer; default SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", default="1k,4k,8k,32k", help="lengths [1k,4k,8k,32k]")
    parser.add_argument("--count", type=int, default=1, help="texts of each length [1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write FOLDER/prompt_TOKENS_NUMBER.txt. Returns 0."""
    from engine.tokenization import load_tokenizer

    if rest:
        raise ValueError(f"{rest[0]} is unknown")
    if args.count < 1:
        raise ValueError(f"--count {args.count} must be at least 1")
    encode = load_tokenizer(resolve_model(args.model)).encode
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for tokens in lengths(args.tokens):
        for number in range(args.count):
            path = args.out / f"prompt_{tokens}_{number}.txt"
            path.write_text(fixed_text(encode, tokens, args.seed + number), "utf-8")
            written.append(str(path))
            print(path)
    print(json.dumps({"command": "prompts", "files": written}))
    return 0


def fixed_text(encode: Callable[[str], Sequence[int]], tokens: int, seed: int) -> str:
    """A text that encode() gives exactly so many tokens; another seed gives another one. Raises ValueError where this
    tokenizer has no such text among those tried."""
    rng = random.Random(seed)
    sentences = [sentence.strip() + "." for passage in PASSAGES for sentence in passage.split(". ")]
    words: list[str] = []
    while len(words) < 2 * tokens:
        words += rng.choice(sentences).split()
    low, high = 0, len(words)  # the most words whose text has at most tokens - MARGIN_TOKENS, if any has
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode(" ".join(words[:middle]))) <= max(1, tokens - MARGIN_TOKENS):
            low = middle
        else:
            high = middle - 1
    text = " ".join(words[:low])
    while (missing := tokens - len(encode(text))) > 0:
        grown = [text + filler for filler in FILLERS]
        fitting = [longer for longer in grown if tokens - len(encode(longer)) in range(missing)]
        if not fitting:
            break
        text = rng.choice(fitting)
    if len(encode(text)) != tokens:
        raise ValueError(f"no text of exactly {tokens} tokens was found; try another --seed")
    return text
