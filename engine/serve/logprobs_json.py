"""Logprobs as OpenAI writes them, one entry for each token of the engine: LogprobsJson.

A token's name is its text; one that is not whole characters is `bytes:\\xe2\\x80`, as OpenAI spells such. It knows a
vocabulary only as a table of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.plan import TokenLogprobs
from engine.tokenization.vocabulary import PieceTable

LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class LogprobsJson:
    """chat: the shape of chat completions; else that of completions, which has the field `bytes` beside OpenAI's."""

    table: PieceTable
    chat: bool

    def __call__(self, entries: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, Any]:
        """The `logprobs` of a choice (of a piece of it, when streaming). offsets: characters before each."""
        if self.chat:
            return {"content": [
                {**self._token(entry.ids[0], entry.values[0]),
                 "top_logprobs": [self._token(*pair) for pair in zip(entry.ids[1:], entry.values[1:], strict=True)]}
                for entry in entries]}  # fmt: skip
        return {"tokens": [self.name(entry.ids[0]) for entry in entries],
                "token_logprobs": [max(LEAST, entry.values[0]) for entry in entries],
                "top_logprobs": [self._named(entry) for entry in entries], "text_offset": list(offsets),
                "bytes": [self._bytes(entry.ids[0]) for entry in entries]}  # fmt: skip

    def name(self, token: int) -> str:
        """A token as text; a special one by its name."""
        piece = self.table.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _bytes(self, token: int) -> list[int] | None:
        """What it adds to the text; None for a special token, which adds nothing."""
        return None if token in self.table.special_ids else list(self.table.piece(token))

    def _token(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": max(LEAST, value), "bytes": self._bytes(token)}

    def _named(self, entry: TokenLogprobs) -> dict[str, float]:
        """Name -> logprob, falling; of ids that share a name the likeliest, and the sampled token in any case."""
        found: dict[str, float] = {}
        for token, value in zip(entry.ids[1:] + entry.ids[:1], entry.values[1:] + entry.values[:1], strict=True):
            found.setdefault(self.name(token), max(LEAST, value))
        return found


def chars_begun(piece: bytes) -> int:
    """Characters of the text that begin in a token's bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
