"""`python -m scripts.patch inspect`: an artefact's numbers, and its first n-grams when the base is there."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from engine.patching.artefact_files import read
from engine.patching.base import base_folder, load_base
from engine.patching.errors import MissingFile
from engine.patching.invariants import dead_ngrams
from engine.patching.place import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `inspect`."""
    parser.add_argument("patch", type=Path, metavar="DIR", help="an artefact, or a model folder with one")
    parser.add_argument("--base", metavar="TOKENIZER", help="what it was built on: folder with tokenizer.json, .gguf "
                        "file or hub id (default: DIR's own)")
    parser.add_argument("--ngrams", type=int, default=20, metavar="N", help="n-grams to spell out (default 20)")


def run(args: argparse.Namespace) -> int:
    """Print."""
    place = find(args.patch)
    if place is None:
        raise MissingFile(f"{args.patch}: holds no artefact (patch.json)")
    folder = base_folder(args.base) if args.base else args.patch
    base = load_base(folder) if args.base or (folder / "tokenizer.json").is_file() else None
    artefact = read(place, base=base)
    dead = dead_ngrams(artefact.ngrams if artefact.kind == "patch" else (), artefact.removed)
    facts = {
        "kind": artefact.kind, "sha256": artefact.sha256, "base sha256": artefact.base_sha256,
        "ids": artefact.vocab_size, "base ids": artefact.base_vocab_size, "removed": len(artefact.removed),
        "longest decomposition": max(map(len, artefact.removed.values()), default=1),
        "n-grams by length": dict(sorted(Counter(map(len, artefact.ngrams)).items())),
        "n-grams with a removed piece": len(dead.removed_piece),
        "n-grams behind a prefix of higher priority": len(dead.prefix_dominated),
        "kept ids that moved": sum(old != new for old, new in artefact.new_id_of.items()),
    }  # fmt: skip
    for name, value in facts.items():
        print(f"{name:44} {value}")
    print(f"{'meta':44} {json.dumps(artefact.meta, ensure_ascii=False)[:400]}")
    for index, pieces in enumerate(artefact.ngrams[: max(0, args.ngrams)] if base is not None else ()):
        assert base is not None
        text = b"".join(base.table.pieces[piece] for piece in pieces).decode("utf-8", "replace")
        print(f"  {artefact.ngram_ids[index]:8}  {text!r}")
    return 0
