"""What everything else may ask of a vocabulary (Tokenizer), and how its ids become bytes (PieceTable).

A vocabulary whose ids stand for more than one base piece (a patched one) is another implementation of Tokenizer: it
fills a PieceTable whose entries are longer, and nothing above it changes. It does not encode anything itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The bytes of every id, and how a decoder joins them.

    pieces: bytes of id i; b"" for ids that stand for nothing. byte_runs: False = all bytes of a text are joined and
    decoded as one UTF-8 text, each maximal invalid part becoming U+FFFD (byte-level BPE). True = only `byte_ids`
    are bytes: a run of them is UTF-8 or else one U+FFFD for each of them, everything else is text already
    (SentencePiece with byte fallback). strip: that many leading `strip_text` characters of a whole text are dropped
    (SentencePiece's dummy prefix). special_ids: ids that skip_special_tokens leaves out. mixed: with byte_runs, an id
    that stands for several pieces of which some are bytes -> (bytes, is a byte) of each; it is in no byte_ids.
    """

    pieces: Sequence[bytes]
    special_ids: frozenset[int] = frozenset()
    byte_runs: bool = False
    byte_ids: frozenset[int] = field(default=frozenset())
    strip: int = 0
    strip_text: str = " "
    mixed: Mapping[int, Sequence[tuple[bytes, bool]]] = field(default_factory=dict)

    def piece(self, token: int) -> bytes:
        """Bytes of an id, special or not; b"" for one the vocabulary does not have (padding rows of a model)."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""


class Part(NamedTuple):
    """A piece of a rendered chat. parse_special: the template wrote it; False = a user did, and special strings in it
    are text."""

    text: str
    parse_special: bool


class Encoded(NamedTuple):
    """ids: of the engine. base_ids: of the same text in the base vocabulary; the same list where there is no patch."""

    ids: list[int]
    base_ids: list[int]


class Tokenizer(Protocol):
    """A vocabulary, as the server and the offline API use it. Immutable and safe to share between threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""

    @property
    def max_token_bytes(self) -> int:
        """No id stands for more bytes of text: a text of more than n times this needs more than n tokens (rule R23:
        refuse by bytes before encoding)."""

    @property
    def bos_id(self) -> int | None:
        """From generation_config.json or config.json, else the tokenizer's own."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, from the same files."""

    @property
    def special_ids(self) -> frozenset[int]:
        """What skip_special_tokens leaves out."""

    @property
    def chat_template(self) -> str | None:
        """The template's source; None = the model has none."""

    @property
    def table(self) -> PieceTable:
        """How ids become bytes."""

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Ids of a text. parse_special: False reads `</s>` and the like as text. Raises RequestError for text that is
        not valid Unicode."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True
                     ) -> list[list[int]]:
        """encode of each, on all cores where that is allowed."""

    def encode_both(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """encode, with the base vocabulary's ids of the text."""

    def encode_parts(self, parts: Sequence[Part]) -> Encoded:
        """Ids of a chat: special strings count only where the template wrote them, nothing is added, and no n-gram
        of a patched vocabulary reaches from one part into the next. Raises RequestError as encode does."""

    def from_base_ids(self, ids: Sequence[int]) -> list[int]:
        """The engine's ids for ids of the base vocabulary: those of encode, where these are the base's encoding of a
        text. Raises RequestError for an id that the base has not."""

    def to_new_id(self, base_id: int) -> int:
        """The one engine id of a base id. Raises RequestError for one that has none."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids the vocabulary does not have stand for nothing."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes an id stands for; b"" for special and unknown ids."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's chat template writes them. Raises RequestError when it cannot."""

    def render_parts(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[Part]:
        """render_chat, cut where the template's words and the messages' meet. For encode_parts."""
