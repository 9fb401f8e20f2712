"""The PieceTable of a tokenizer.json: which bytes each id stands for, read from the decoder it names.

Two decoders exist in the models we serve: ByteLevel (GPT-2, Llama 3, Qwen2, SmolLM2), and SentencePiece's sequence
Replace, ByteFallback, Fuse, Strip (Llama 2, Mistral v1, TinyLlama, Yi). Any other is refused: a table that is only
nearly right would stream other text than the whole decodes to. It does not decode streams; stream.py does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from engine.core.errors import LoadError
from engine.tokenization.vocabulary import PieceTable

MAX_ID = 1 << 24
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards, in order.

    Source: the encoder published with GPT-2 (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in set(printable))
    return mapping | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def build_table(backend: tokenizers.Tokenizer, definition: Mapping[str, Any], origin: str) -> PieceTable:
    """The table of a loaded tokenizer. definition: its JSON. Raises LoadError for a decoder it cannot be exact for."""
    vocab = backend.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= MAX_ID:
        raise LoadError(f"{origin}: its highest token id is {size - 1}; allowed: 0..{MAX_ID - 1}")
    special = frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
    steps = _steps(definition.get("decoder"), origin)
    pieces = [b""] * size
    if [step["type"] for step in steps] == ["ByteLevel"]:
        alphabet = byte_of_char()
        known = frozenset(alphabet)
        latin = str.maketrans({char: chr(byte) for char, byte in alphabet.items()})
        for piece, token in vocab.items():
            spelled = known.issuperset(piece)  # else it is an added token with characters outside the alphabet
            pieces[token] = piece.translate(latin).encode("latin-1") if spelled else piece.encode()
        return PieceTable(pieces, special)
    return _sentencepiece(vocab, pieces, special, steps, origin)


def _sentencepiece(vocab: Mapping[str, int], pieces: list[bytes], special: frozenset[int],
                   steps: list[dict[str, Any]], origin: str) -> PieceTable:
    """The table for Replace..., ByteFallback, Fuse and at most one Strip of leading characters, in that order."""
    kinds = [step["type"] for step in steps]
    replaces = [step for step in steps if step["type"] == "Replace"]
    order = ["Replace"] * len(replaces) + ["ByteFallback", "Fuse"]
    if kinds not in (order, [*order, "Strip"]):
        raise LoadError(f"{origin}: its decoder is {', '.join(kinds)[:120] or 'none'}, for which streamed text could "
                        "differ from the whole; supported: ByteLevel, and Replace, ByteFallback, Fuse, Strip")
    for step in replaces:
        if not isinstance(step.get("pattern"), dict) or not isinstance(step["pattern"].get("String"), str):
            raise LoadError(f"{origin}: its decoder replaces by a regular expression, which is not supported")
    byte_ids = set()
    for piece, token in vocab.items():
        text = piece
        for step in replaces:
            text = text.replace(step["pattern"]["String"], str(step.get("content", "")))
        match = _BYTE_PIECE.fullmatch(text)
        if match:
            byte_ids.add(token)
            pieces[token] = bytes([int(match[1], 16)])
        else:
            pieces[token] = text.encode()
    strip: dict[str, Any] = steps[-1] if kinds[-1] == "Strip" else {"start": 0, "stop": 0, "content": " "}
    start, content = strip.get("start"), strip.get("content")
    if strip.get("stop") or not isinstance(start, int) or not isinstance(content, str) or len(content) != 1:
        raise LoadError(f"{origin}: its decoder strips the end of a text, which is not supported when streaming")
    return PieceTable(pieces, special, True, frozenset(byte_ids), start, content)


def _steps(decoder: Any, origin: str) -> list[dict[str, Any]]:
    """A decoder's steps, sequences flattened one level."""
    if decoder is None:
        return []
    listed = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(listed, list) or not all(isinstance(step, dict) and "type" in step for step in listed):
        raise LoadError(f"{origin}: its decoder is not an object or a sequence of objects")
    return listed
