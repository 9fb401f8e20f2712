"""OpenAI's response objects, whole and as stream events, to JSON bytes.

It does not know where text comes from. Chat and completions differ in four names; everything else is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.core.plan import TokenLogprobs
from engine.serve.errors import ApiError
from engine.serve.generation import TextDelta
from engine.serve.logprobs_json import LogprobsJson

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """What a stream ends with when it cannot go on."""
    return event(error.body())


@dataclass(frozen=True, slots=True)
class Shape:
    """One response's constant parts. logprobs: how to write them; None = not asked for."""

    chat: bool
    request_name: str
    created_s: int
    model: str
    include_usage: bool = False
    logprobs: LogprobsJson | None = None

    @property
    def id(self) -> str:
        """The response's id, e.g. cmpl-..."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_name}"

    def whole(self, choices: Sequence[tuple[str, str, Sequence[TokenLogprobs], Sequence[int]]],
              usage: dict[str, int]) -> bytes:
        """A plain answer. choices: (text, finish reason, logprobs, their offsets) in order."""
        made = [self._choice(i, *choice) for i, choice in enumerate(choices)]
        kind = "chat.completion" if self.chat else "text_completion"
        return _encode({"id": self.id, "object": kind, "created": self.created_s, "model": self.model,
                        "choices": made, "usage": usage})  # fmt: skip

    def opening(self, echoes: Sequence[str]) -> bytes:
        """The first events of a stream: for chat, each choice's role; else the text that goes before it, if any."""
        if self.chat:
            return b"".join(self._frame([self._delta(i, {"role": "assistant", "content": ""}, None)])
                            for i in range(len(echoes)))
        return b"".join(self._frame([self._choice(i, text, None)]) for i, text in enumerate(echoes) if text)

    def delta(self, delta: TextDelta) -> bytes:
        """The events of new text; the last of a choice has its finish reason."""
        if not self.chat:
            return self._frame([self._choice(delta.index, delta.text, delta.finish_reason, delta.logprobs,
                                             delta.offsets)])
        frames = b""
        if delta.text or delta.logprobs:
            frames += self._frame([self._delta(delta.index, {"content": delta.text}, None, delta.logprobs)])
        if delta.finish_reason is not None:
            frames += self._frame([self._delta(delta.index, {}, delta.finish_reason)])
        return frames

    def closing(self, usage: dict[str, int]) -> bytes:
        """The last events: usage when it was asked for, and [DONE]."""
        return (self._frame([], usage) if self.include_usage else b"") + DONE

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprobs] = (),
                offsets: Sequence[int] = ()) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        told = self._told(logprobs, offsets) if logprobs else None
        return {"index": index, **said, "logprobs": told, "finish_reason": reason}

    def _delta(self, index: int, delta: dict[str, str], reason: str | None, logprobs: Sequence[TokenLogprobs] = ()
               ) -> dict[str, Any]:
        told = self._told(logprobs, ()) if logprobs else None
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}

    def _told(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, Any]:
        assert self.logprobs is not None
        return self.logprobs(logprobs, offsets)

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        value: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created_s, "model": self.model,
                                 "choices": choices}  # fmt: skip
        if self.include_usage:
            value["usage"] = usage
        return event(value)
