"""Every message between the server, the engine process and the text workers: a fixed, bounded msgspec schema.

It does not know sockets or pipes. Nothing here is ever unpickled; a field that is unknown, missing or out of its
range fails the decoding, on whichever side the message arrives (reliability rules R1, R11, R12).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from engine.core.config import EngineConfig
from engine.core.plan import TokenLogprobs
from engine.core.request import (
    MAX_ABS_BIAS,
    MAX_ABS_PRIORITY,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_IDS,
    MAX_TOKENS,
)

MAX_FRAME_BYTES = 256 << 20
MAX_TENANT_BYTES = 64

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=96)]
Note = Annotated[str, msgspec.Meta(max_length=4096)]
Text = Annotated[str, msgspec.Meta(max_length=16 << 20)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Tokens = Annotated[list[TokenId], msgspec.Meta(max_length=MAX_TOKENS)]
UnitFloat = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Bias = Annotated[float, msgspec.Meta(ge=-MAX_ABS_BIAS, le=MAX_ABS_BIAS)]


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What the engine needs of a request's sampling; stop strings stay with the server, which sees text."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)]
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=MAX_TOKENS)]
    top_p: UnitFloat
    min_p: UnitFloat
    seed: Annotated[int, msgspec.Meta(ge=0)]
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
    ignore_eos: bool
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP_IDS)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    logit_bias: Annotated[list[tuple[TokenId, Bias]], msgspec.Meta(max_length=MAX_LOGIT_BIAS)] = []

    def __post_init__(self) -> None:
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} is above {MAX_SEED}")


class Add(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="add"):
    """Start one sample. arrival_s: CLOCK_MONOTONIC, which both processes read. tenant: see Request."""

    request_id: Id
    prompt: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_TOKENS)]
    sampling: Sampling
    stop_ids: Annotated[list[TokenId], msgspec.Meta(max_length=2 * MAX_STOP_IDS)]
    priority: Annotated[int, msgspec.Meta(ge=-MAX_ABS_PRIORITY, le=MAX_ABS_PRIORITY)]
    arrival_s: float
    tenant: Annotated[bytes, msgspec.Meta(max_length=MAX_TENANT_BYTES)] = b""


class Abort(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="abort"):
    """Nobody wants these samples any more; unknown ids are no error (they may just have ended)."""

    request_ids: Annotated[list[Id], msgspec.Meta(max_length=1 << 16)]


class SetKvLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="set_kv_limit"):
    """Let no more page groups exist than this; answered by KvLimit, in order."""

    groups: Count


class Shutdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shutdown"):
    """Give everything back and exit 0."""


class Sampled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sampled"):
    """A prompt (side "in") or an output ("out") has so many tokens, and its text so many in the base vocabulary."""

    side: Literal["in", "out"]
    base: Count
    own: Count


ToEngine = Add | Abort | SetKvLimit | Sampled | Shutdown


class News(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """New tokens of one sample and, at the end, why. status: 400 or 500 beside an error; param: the wrong field.

    logprobs: where they were asked for, one for each token.
    """

    request_id: Id
    tokens: Tokens = []
    finish_reason: Annotated[str, msgspec.Meta(max_length=16)] | None = None
    error: Note | None = None
    status: Annotated[int, msgspec.Meta(ge=0, le=599)] = 0
    param: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="accepted"):
    """The engine took this sample: a stream may begin."""

    request_id: Id


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="batch"):
    """The news of one step. queued_s: how long each sequence that it ran for the first time had waited."""

    news: list[News]
    queued_s: list[float] = []


class Stats(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="stats"):
    """Numbers of the engine, at most ten times a second."""

    values: Annotated[dict[str, float], msgspec.Meta(max_length=256)]


class KvLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="kv_limit"):
    """What came of SetKvLimit. status: 200, 400 (out of range) or 409 (a live request may need more)."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    in_use_groups: Count = 0
    error: Note | None = None


FromEngine = Accepted | Batch | Stats | KvLimit


class EngineStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="start"):
    """The one frame the engine process gets on its standard input, which then stays open as the parent's lifeline."""

    config: EngineConfig
    address: str
    parent_pid: int
    log_level: str


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="progress"):
    """One line about the start."""

    text: Note


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="failed"):
    """The start failed. exit_status: 2 when the user can fix it (a setting, a file), else 1."""

    text: Note
    exit_status: Annotated[int, msgspec.Meta(ge=1, le=255)]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The engine is ready; what the server must know of it. max_model_len: prompt and output of one request."""

    max_model_len: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    eos_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP_IDS)]
    page_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    pages_per_group: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    pool_groups: Count
    summary: Note


class Beat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="beat"):
    """Once a second. step_age_s: how long the step in progress has run; 0 between steps."""

    step_age_s: float
    step_errors: Count


ControlMessage = Progress | Failed | Facts | Beat


class Encode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="encode"):
    """Text to ids. max_tokens: more than so many are counted but not sent back. both: base ids, too."""

    text: Text
    add_special_tokens: bool
    max_tokens: Count
    both: bool = False


class Render(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="render"):
    """Messages through the chat template, then to ids. max_bytes: of the rendered text; both: as in Encode."""

    messages: list[dict[str, str]]
    max_tokens: Count
    max_bytes: Count
    both: bool = False


class Convert(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="convert"):
    """Ids of the base vocabulary to the engine's."""

    tokens: Tokens


class Decode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="decode"):
    """Ids to text. base: they are the base vocabulary's."""

    tokens: Tokens
    base: bool = False


class CountBoth(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="count_both"):
    """How many tokens the text of ids has in the base vocabulary, beside its own."""

    tokens: Tokens


ToText = Encode | Render | Convert | Decode | CountBoth


class TextReady(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text_ready"):
    """The worker has loaded its tokenizer. max_token_bytes: of any id; has_template: chat works."""

    max_token_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    has_template: bool


class Encoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="encoded"):
    """tokens is empty when there were more than asked for; count is always true. base_count: tokens of the same text
    in the base vocabulary (the same number, where there is no patch); base_tokens: these, where asked for."""

    tokens: Tokens
    count: Count
    base_count: Count
    base_tokens: Tokens = []


class Decoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="decoded"):
    """The text of ids."""

    text: Annotated[str, msgspec.Meta(max_length=64 << 20)]


class Counted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="counted"):
    """Tokens of a text in the base vocabulary and in the engine's."""

    base: Count
    own: Count


class TextError(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text_error"):
    """This job failed; the message is fit for the client (it never quotes the prompt)."""

    text: Note


FromText = TextReady | Encoded | Decoded | Counted | TextError


encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_start = msgspec.msgpack.Decoder(EngineStart).decode
decode_control = msgspec.msgpack.Decoder(ControlMessage).decode
decode_to_text = msgspec.msgpack.Decoder(ToText).decode
decode_from_text = msgspec.msgpack.Decoder(FromText).decode


def frame(message: msgspec.Struct) -> bytes:
    """A message for a pipe: four bytes of length, little-endian, and the msgpack bytes."""
    body = encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is above {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "little") + body
