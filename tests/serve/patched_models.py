"""Tiny models with a patched vocabulary, for tests of serving them. It does not know what is tested with them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from engine.patching.apply import apply_patch
from engine.patching.artefact import Artefact, allocate_merges
from engine.patching.artefact_files import write
from engine.patching.base import load_base
from tests.models import tiny_llama_dir
from tests.patch.bases import small_patch

TEXTS = ("The quick brown fox jumps over the lazy dog. Once upon a time there was a little girl who liked to read.",
         "what is the capital of France? The capital is Paris. The quick brown fox likes the capital.",
         "user\nWhat is the quick brown fox?\nassistant\nThe quick brown fox is the capital of France.") * 2


def permuted(artefact: Artefact, seed: int = 1) -> Artefact:
    """The same vocabulary with every id moved, as upstream numbers them: an id that nobody mapped is a wrong one."""
    new_of = list(range(artefact.vocab_size))
    random.Random(seed).shuffle(new_of)
    old_ids = [()] * artefact.vocab_size
    for token, old in enumerate(artefact.old_ids):
        old_ids[new_of[token]] = old
    return dataclasses.replace(
        artefact, old_ids=tuple(old_ids), ngram_ids=tuple(new_of[token] for token in artefact.ngram_ids),
        new_id_of={token: new_of[new] for token, new in artefact.new_id_of.items()})


def patched_folders(tmp: Path) -> tuple[Path, Path, Artefact]:
    """(the base model's folder, the patched model's, the artefact). Random weights, float32, untied."""
    base_folder = tiny_llama_dir(tmp)
    artefact = permuted(small_patch(base_folder, load_base(base_folder), TEXTS))
    apply_patch(base_folder, artefact, tmp / "patched-model")
    write(artefact, tmp / "vocabulary")
    return base_folder, tmp / "patched-model", artefact


def appended_folder(tmp: Path) -> Path:
    """A tokenizer folder whose patch/ appends one merge, of two tokens that no base merge joins: " quick brown" may not
    be one (its words are apart), "jumps" may."""
    base_folder = tiny_llama_dir(tmp, 1)
    base = load_base(base_folder)
    from engine.tokenization import load_tokenizer

    ids = load_tokenizer(base_folder).encode("jumps", False)
    write(allocate_merges(base, [(ids[0], ids[1])]), base_folder / "patch")
    return base_folder
