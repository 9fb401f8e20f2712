"""OpenAI's response objects, whole and as stream events, to JSON bytes.

It does not know where text comes from. Chat and completions differ in four names; everything else is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.serve.errors import ApiError
from engine.serve.generation import TextDelta

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
    """One response's constant parts."""

    chat: bool
    request_name: str
    created_s: int
    model: str
    include_usage: bool = False

    @property
    def id(self) -> str:
        """The response's id, e.g. cmpl-..."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_name}"

    def whole(self, choices: Sequence[tuple[str, str]], usage: dict[str, int]) -> bytes:
        """A plain answer. choices: (text, finish reason) in order."""
        made = [self._choice(i, text, reason) for i, (text, reason) in enumerate(choices)]
        kind = "chat.completion" if self.chat else "text_completion"
        return _encode({"id": self.id, "object": kind, "created": self.created_s, "model": self.model,
                        "choices": made, "usage": usage})  # fmt: skip

    def opening(self, count: int) -> bytes:
        """The first events of a stream: for chat, each choice's role."""
        if not self.chat:
            return b""
        return b"".join(self._frame([self._delta(i, {"role": "assistant", "content": ""}, None)]) for i in range(count))

    def delta(self, delta: TextDelta) -> bytes:
        """The events of new text; the last of a choice has its finish reason."""
        if not self.chat:
            choice = {"index": delta.index, "text": delta.text, "logprobs": None, "finish_reason": delta.finish_reason}
            return self._frame([choice])
        frames = b""
        if delta.text:
            frames += self._frame([self._delta(delta.index, {"content": delta.text}, None)])
        if delta.finish_reason is not None:
            frames += self._frame([self._delta(delta.index, {}, delta.finish_reason)])
        return frames

    def closing(self, usage: dict[str, int]) -> bytes:
        """The last events: usage when it was asked for, and [DONE]."""
        return (self._frame([], usage) if self.include_usage else b"") + DONE

    def _choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        if self.chat:
            return {"index": index, "message": {"role": "assistant", "content": text}, "logprobs": None,
                    "finish_reason": reason}  # fmt: skip
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _delta(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        value: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created_s, "model": self.model,
                                 "choices": choices}  # fmt: skip
        if self.include_usage:
            value["usage"] = usage
        return event(value)
