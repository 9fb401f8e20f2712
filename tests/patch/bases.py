"""Base vocabularies and upstream pickles for tests of patched vocabularies, made here; where the reference data is.

It does not know what is tested with them. The pickles are written opcode by opcode: the module is never imported.
"""

from __future__ import annotations

import functools
import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.patching.artefact import Artefact, allocate
from engine.patching.base import BaseVocabulary, load_base
from tests.models import write_tiny_tokenizer

SP_TEXT = (
    "The quick brown fox jumps over the lazy dog. The lazy dog sleeps near the quick fox.",
    "It was the best of times, it was the worst of times; the capital of France is Paris.",
    "Größe, café, naïve, and numbers such as 12, 345 and 6789 appear in the stories.",
)


def reference_dir() -> Path:
    """The reference data beside the checkout, or in shared/ of any folder above it; skips the test without."""
    here = Path(__file__).resolve()
    for above in here.parents:
        found = above / "shared" / "reference" / "patch"
        if found.is_dir():
            return found
    pytest.skip("the reference data (shared/reference/patch beside the checkout) is not here")


def write_tiny_sentencepiece(folder: Path) -> None:
    """A SentencePiece-style BPE with byte fallback: <unk>, <s>, </s>, 256 byte pieces, then pieces of SP_TEXT."""
    (folder / "tokenizer.json").write_text(_sentencepiece_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@functools.cache
def _sentencepiece_json() -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(SP_TEXT * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=names,
                                                              show_progress=False))  # fmt: skip
    definition = json.loads(made.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    definition["pre_tokenizer"] = None
    definition["model"] |= {"byte_fallback": True, "fuse_unk": True}
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    definition["post_processor"] = {"type": "TemplateProcessing", "single": start, "pair": start * 2,
                                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    definition["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
    return json.dumps(definition, ensure_ascii=False)


def decompositions(definition: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Base id -> the two ids of its first merge, for every token that a merge makes. definition: tokenizer.json."""
    model = definition["model"]
    found: dict[int, tuple[int, ...]] = {}
    for pair in model["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ", 1)
        found.setdefault(model["vocab"][left + right], (model["vocab"][left], model["vocab"][right]))
    return found


def definition_of(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer.json."""
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return found


def flat(token: int, parts_of: dict[int, tuple[int, ...]], removed: set[int]) -> tuple[int, ...]:
    """The decomposition of a token until no part is removed."""
    out: tuple[int, ...] = ()
    for part in parts_of[token]:
        out += flat(part, parts_of, removed) if part in removed else (part,)
    return out


def small_patch(folder: Path, base: BaseVocabulary, texts: tuple[str, ...], removed_count: int = 12,
                meta: dict[str, Any] | None = None) -> Artefact:
    """Removes the last tokens that merges make, adds pairs and triples that occur in the texts, most frequent first
    but every third one moved to the front, so that priority is not length."""
    from tokenizers import Tokenizer

    parts_of = decompositions(definition_of(folder))
    removed = set(sorted(parts_of)[-removed_count:]) if removed_count else set()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        for length in (2, 3, 4):
            counts.update(zip(*(ids[start:] for start in range(length)), strict=False))
    ngrams = [pieces for pieces, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
              if base.special_ids.isdisjoint(pieces)][: 3 * max(removed_count, 40)]
    ngrams = ngrams[::3] + ngrams[1::3] + ngrams[2::3]
    return allocate(base, {token: flat(token, parts_of, removed) for token in removed}, ngrams, meta)


def tiny_base(folder: Path, kind: str) -> BaseVocabulary:
    """Write the "bytes" (byte-level) or "pieces" (SentencePiece) vocabulary into a folder; what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (write_tiny_tokenizer if kind == "bytes" else write_tiny_sentencepiece)(folder)
    return load_base(folder)


def pickled(value: Any) -> bytes:
    """A value of dicts, lists, tuples, text, bytes and ints as pickle protocol 4 writes it, without a memo."""
    return b"\x80\x04" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_opcodes, value)) + b"t"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    raw = value.encode() if isinstance(value, str) else value
    return (b"X" if isinstance(value, str) else b"B") + struct.pack("<I", len(raw)) + raw
