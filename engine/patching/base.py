"""What a patch must know of the vocabulary it changes: BaseVocabulary, and the hash that names it.

The hash is of a canonical form, not of a file: the same vocabulary written by another version of a library, or
rebuilt from a GGUF's metadata with the same rules, has the same hash. It encodes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import LoadError
from engine.tokenization.vocabulary import PieceTable

_FLAGS = {"unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
          "byte_fallback": False, "ignore_merges": False}  # fmt: skip
_ADDED_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_OFFSETS_ONLY = frozenset(("trim_offsets",))  # fields that change no id


@dataclass(frozen=True)
class BaseVocabulary:
    """A base tokenizer's ids. strings: the vocabulary's spelling of id i (None = no such token); table: its bytes.

    vocab_size is one more than the highest id, added tokens included.
    """

    sha256: str
    strings: tuple[str | None, ...]
    table: PieceTable

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self.strings)

    @property
    def special_ids(self) -> frozenset[int]:
        """What skip_special_tokens leaves out."""
        return self.table.special_ids

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Spelling -> id."""
        return {text: token for token, text in enumerate(self.strings) if text is not None}

    def has(self, token: int) -> bool:
        """Whether an id is a token of the vocabulary."""
        return 0 <= token < len(self.strings) and self.strings[token] is not None


def base_folder(name: str, progress: bool = True) -> Path:
    """A folder as it is: a tokenizer needs no model around it. Anything else names a model. Raises as resolve_model."""
    from engine.loading.resolve import resolve_model

    folder = Path(name).expanduser()
    return folder if folder.is_dir() else resolve_model(name, progress=progress)


def load_base(folder: str | Path) -> BaseVocabulary:
    """The base vocabulary of a tokenizer folder. Raises LoadError as load_tokenizer does."""
    from engine.tokenization.hf import load_base_tokenizer

    tokenizer, definition = load_base_tokenizer(folder)
    return base_of(tokenizer.vocab(), tokenizer.table, definition)


def base_of(vocab: Mapping[str, int], table: PieceTable, definition: Mapping[str, Any]) -> BaseVocabulary:
    """From a loaded tokenizer (vocab: with added tokens) and its tokenizer.json."""
    strings: list[str | None] = [None] * len(table.pieces)
    for text, token in vocab.items():
        strings[token] = text
    return BaseVocabulary(canonical_sha256(definition), tuple(strings), table)


def canonical_sha256(definition: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a tokenizer.json's vocabulary by id, merges in order, added tokens, normaliser and
    pre-tokenizer. Decoder, post-processor, truncation and padding are left out: they change no piece's id.

    Raises LoadError for a model that is not BPE or not well formed.
    """
    model = definition.get("model")
    is_bpe = isinstance(model, dict) and model.get("type") in ("BPE", None)
    if not isinstance(model, dict) or not is_bpe or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise LoadError(f"the base tokenizer's model is {str(kind)[:40]}; a patched vocabulary needs BPE")
    try:
        vocab = sorted((token, text) for text, token in model["vocab"].items())
        merges = [list(pair) if isinstance(pair, list) else pair.split(" ", 1) for pair in model.get("merges", ())]
        added = sorted([token["id"], token["content"], *(bool(token.get(flag)) for flag in _ADDED_FLAGS)]
                       for token in definition.get("added_tokens") or ())
    except (TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"the base tokenizer's vocabulary is not well formed: {str(error)[:120]}") from None
    form = {
        "vocab": vocab, "merges": merges, "added": added,
        "flags": {name: model.get(name) or default for name, default in _FLAGS.items()},
        "normalizer": _steps(definition.get("normalizer"), "normalizers"),
        "pre_tokenizer": _steps(definition.get("pre_tokenizer"), "pretokenizers"),
    }  # fmt: skip
    text = json.dumps(form, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _steps(value: Any, list_name: str) -> list[Any]:
    """A normaliser or pre-tokenizer as a flat list of steps, without the fields that change no id."""
    if not isinstance(value, dict):
        return []
    inner = value.get(list_name)
    if value.get("type") == "Sequence" and isinstance(inner, list):
        return [step for item in inner for step in _steps(item, list_name)]
    return [{name: item for name, item in value.items() if name not in _OFFSETS_ONLY}]
