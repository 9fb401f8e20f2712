"""What the engine said to one HTTP request since it was last read.

It does not know sockets. It is bounded by construction: a sample's tokens are at most its max_tokens, they are merged
until somebody reads them, and no text is made before that (reliability rule R28).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core.plan import TokenLogprobs


@dataclass(slots=True)
class Piece:
    """News of one sample: tokens not yet read (and their logprobs, where asked for), and the end when it has come.
    status: of an error, 400 or 500."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    status: int = 0
    param: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Mailbox:
    """One reader, samples 0..count-1. The reader learns of news, of acceptance and of the client's leaving."""

    def __init__(self, count: int) -> None:
        self.gone = False  # the client has left
        self._unaccepted = count
        self._pieces: dict[int, Piece] = {}
        self._event = asyncio.Event()

    def accept(self) -> None:
        """The engine took one more sample."""
        self._unaccepted -= 1
        if self._unaccepted <= 0:
            self._event.set()

    def put(self, index: int, tokens: list[int], finish_reason: str | None, error: str | None = None,
            status: int = 0, param: str | None = None, logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Add news of sample `index`."""
        piece = self._pieces.setdefault(index, Piece())
        piece.tokens += tokens
        piece.logprobs += logprobs
        piece.finish_reason = finish_reason or piece.finish_reason
        if error is not None:
            piece.error, piece.status, piece.param = error, status, param
        self._event.set()

    def leave(self) -> None:
        """The client is gone: wake the reader."""
        self.gone = True
        self._event.set()

    async def accepted(self) -> None:
        """Wait until every sample is accepted, or there is news, or the client has left."""
        while self._unaccepted > 0 and not self._pieces and not self.gone:
            self._event.clear()
            await self._event.wait()

    def peek(self) -> dict[int, Piece]:
        """The news there is, left in place."""
        return self._pieces

    async def take(self) -> dict[int, Piece]:
        """Wait for news; everything there is, by sample. Empty when the client has left."""
        while not self._pieces and not self.gone:
            self._event.clear()
            await self._event.wait()
        pieces, self._pieces = self._pieces, {}
        return {} if self.gone else pieces
