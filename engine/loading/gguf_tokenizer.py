"""A GGUF file's tokenizer metadata become tokenizer.json, tokenizer_config.json and generation_config.json.

Two kinds exist in the architectures we read: `gpt2` (byte-level BPE with merges; the pre-tokenizer's regular
expression is only named, by tokenizer.ggml.pre) and `llama` (SentencePiece BPE with scores, from which the merges
follow). It does not encode anything; engine/tokenization does, from the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import LoadError

MAX_TEMPLATE_BYTES = 64 << 10

# Token types of the GGUF specification; 1 is an ordinary piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The regular expressions are facts of the models, the same that their own tokenizer.json states.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text before merging. pattern: None = GPT-2's, built into `tokenizers`."""

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


# tokenizer.ggml.pre -> how it cuts; names as llama.cpp spells them
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "llama3": PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, nfc=True),
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, adds_bos=True),
}


@dataclass(frozen=True, slots=True)
class RebuiltTokenizer:
    """The contents of the three files."""

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]


class _Metadata:
    """Typed access to tokenizer.ggml.*; every complaint names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.path = path

    def get(self, key: str, kind: type[Any], default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.{key}", default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.fail(key, f"is not of type {kind.__name__}")
        return value

    def listed(self, key: str, kind: type[Any]) -> list[Any]:
        value = self._metadata.get(f"tokenizer.{key}")
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.fail(key, f"is not a list of {kind.__name__}")
        return value

    def token_id(self, key: str, vocab: int) -> int | None:
        value = self.get(f"ggml.{key}_token_id", int, None)
        if value is not None and not 0 <= value < vocab:
            raise self.fail(f"ggml.{key}_token_id", f"is {value}, outside 0..{vocab - 1}")
        return None if value is None else int(value)

    def fail(self, key: str, what: str) -> LoadError:
        return LoadError(f"{self.path}: metadata tokenizer.{key} {what}")


def rebuild_tokenizer(metadata: Mapping[str, Any], path: Path, vocab: int, arch: str) -> RebuiltTokenizer:
    """The tokenizer files of a GGUF model. vocab: rows of its embedding; arch: settles an unnamed pre-tokenizer.

    Raises LoadError naming file, key and what is known.
    """
    meta = _Metadata(metadata, path)
    kind = meta.get("ggml.model", str, "")
    tokens: list[str] = meta.listed("ggml.tokens", str)
    types: list[int] = meta.listed("ggml.token_type", int)
    if not 0 < len(tokens) <= vocab or len(types) != len(tokens):
        raise meta.fail("ggml.tokens", f"has {len(tokens)} entries and {len(types)} types, "
                                       f"the embedding {vocab} rows")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(meta, tokens, types, arch)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(meta, tokens, types)
    else:
        raise meta.fail("ggml.model", f"is {kind[:40]!r}; supported: gpt2 (byte-level BPE), "
                                      "llama (SentencePiece BPE)")
    ids = {key: meta.token_id(key, len(tokens)) for key in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    adds_bos = meta.get("ggml.add_bos_token", bool, adds_bos) and ids["bos"] is not None
    bos = ids["bos"]
    tokenizer["post_processor"] = _bos_template(tokens[bos], bos) if adds_bos and bos is not None else None
    tokenizer["added_tokens"] = _added_tokens(tokens, types)
    template = meta.get("chat_template", str, None)
    if template is not None and len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise meta.fail("chat_template", f"has more than {MAX_TEMPLATE_BYTES} bytes")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                              "add_bos_token": adds_bos}
    for key, name in names.items():
        token = ids[key]
        if token is not None:
            config[name] = tokens[token]
    if template is not None:
        config["chat_template"] = template
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    generation: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    generation |= {f"{key[:3]}_token_id": ids[key] for key in ("bos", "padding") if ids[key] is not None}
    return RebuiltTokenizer(tokenizer, config, generation)


def _frame(model: dict[str, Any], normalizer: Any, pre_tokenizer: Any, decoder: Any) -> dict[str, Any]:
    """tokenizer.json around a model; added_tokens and post_processor follow."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


def _byte_level(meta: _Metadata, tokens: list[str], types: list[int], arch: str) -> tuple[dict[str, Any], bool]:
    """(tokenizer.json, whether such tokenizers prepend bos) for `gpt2` vocabularies."""
    named = meta.get("ggml.pre", str, "")
    if named in ("", "default"):
        named = "qwen2" if arch == "qwen2" else "gpt-2"  # files older than the key: what their architecture used
    if named not in PRE_TOKENIZERS:
        raise meta.fail("ggml.pre", f"is {named[:40]!r}, a pre-tokenizer that is not known here; known: "
                                    f"{', '.join(PRE_TOKENIZERS)}. Use this model's Hugging Face folder")
    cut = PRE_TOKENIZERS[named]
    vocab = _vocabulary(meta, tokens, types)
    merges: list[list[str]] = []
    for number, merge in enumerate(meta.listed("ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise meta.fail("ggml.merges", f"entry {number} joins pieces that the vocabulary does not have")
        merges.append([left, right])
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": cut.ignore_merges, "vocab": vocab, "merges": merges}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = []
    if cut.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if cut.pattern is not None:
        steps.append({"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": "Isolated", "invert": False})
    steps.append({**byte_level, "use_regex": cut.pattern is None})
    normalizer = {"type": "NFC"} if cut.nfc else None
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    return _frame(model, normalizer, pre_tokenizer, {**byte_level, "use_regex": True}), cut.adds_bos


def _sentencepiece(meta: _Metadata, tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    """(tokenizer.json, True) for `llama` vocabularies: spaces are the character U+2581, unknown text is bytes."""
    scores = meta.listed("ggml.scores", float)
    if len(scores) != len(tokens):
        raise meta.fail("ggml.scores", f"has {len(scores)} entries for {len(tokens)} tokens")
    vocab = _vocabulary(meta, tokens, types)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": vocab, "merges": merges_from_scores(tokens, types, scores)}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                      {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers: list[dict[str, Any]] = [space]
    if meta.get("ggml.add_space_prefix", bool, True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _frame(model, {"type": "Sequence", "normalizers": normalizers}, None,
                  {"type": "Sequence", "decoders": decoders}), True


def merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """BPE merges that act as SentencePiece's scores do: of all adjacent pairs whose union is a piece, the union
    with the best score is merged first. Every split of a piece into two pieces is a merge; better ones come first.
    """
    pieces = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == _NORMAL}
    order = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, order[left], order[right], left, right))
    merges.sort()
    return [[left, right] for *_, left, right in merges]


def _vocabulary(meta: _Metadata, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Piece -> id without the unused fillers; the same piece twice is refused."""
    vocab: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED:
            continue
        if token in vocab:
            raise meta.fail("ggml.tokens", f"has the piece of id {number} twice")
        vocab[token] = number
    return vocab


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Control tokens (special: never shown) and user-defined ones (shown), both matched before any merging."""
    return [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind != _USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
    ]


def _bos_template(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that prepends bos."""
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 1}},
                 {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
