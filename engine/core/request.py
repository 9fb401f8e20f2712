"""What a client asked for, validated once and immutable from then on.

It does not know text: stop strings travel here, but whoever turns ids into text enforces them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from engine.core.errors import RequestError

# Hard bounds of one request (docs/limits.md); a server may be stricter, never laxer.
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_IDS = 1024
MAX_TOKENS = 1 << 24
MAX_SEED = (1 << 64) - 1
MAX_ABS_PRIORITY = 1 << 31
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024  # ids with one
MAX_ABS_BIAS = 100.0


def _shown(value: object) -> str:
    """A value in a message; Python refuses to write out integers of thousands of digits."""
    huge = isinstance(value, int) and value.bit_length() > 128
    return "an integer of more than 128 bits" if huge else repr(value)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise RequestError unless value is an int (booleans are not) in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={_shown(value)} is not an integer in {low}..{high}", param=name)


def _require_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise RequestError unless value is a number in [low, high] (low excluded when low_open); NaN is in no range.

    Compared as it is: an integer of 400 digits has no float.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good and (low < value if low_open else low <= value) and value <= high:  # type: ignore[operator]
        return
    allowed = f"{'(' if low_open else '['}{low}, {high}]"
    raise RequestError(f"{name}={_shown(value)} is not a number in {allowed}", param=name)


def check_token_ids(name: str, ids: Sequence[int], vocab: int) -> None:
    """Raise RequestError naming the first id that is not an integer in 0..vocab-1."""
    for token in ids:
        _require_int(name, token, 0, vocab - 1)


def _bias_pairs(given: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """logit_bias as pairs in the order of the ids. Raises RequestError naming what is wrong."""
    if not isinstance(given, (Mapping, tuple)) or len(given) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias is not a mapping of at most {MAX_LOGIT_BIAS} token ids to numbers",
                           "logit_bias")
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    for token, bias in pairs:
        _require_int("logit_bias", token, 0, (1 << 31) - 1)
        _require_float("logit_bias", bias, -MAX_ABS_BIAS, MAX_ABS_BIAS)
    return tuple(sorted((token, float(bias)) for token, bias in pairs))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    max_tokens: output tokens at most; None = up to the model's length. temperature: 0 is argmax.
    top_k: 0 or -1 = off. top_p in (0, 1]. min_p in [0, 1]. seed: None = drawn by whoever accepts the request.
    stop: strings that end the text (not included in it). stop_token_ids: ids that end it beside the model's eos list.
    min_tokens: eos and stop ids cannot be sampled, stop strings do not end the text, before that many outputs.
    n: samples of this prompt; each becomes one sequence.
    logprobs: None = none; k = with every token its logarithm of probability, and those of the k likeliest tokens, of
    the model's own distribution (before bias, temperature and filters).
    logit_bias: a mapping (kept as sorted pairs) of ids to numbers in [-100, 100], added to their logits before
    sampling.
    Raises RequestError naming field, value and range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _require_float("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, -1, MAX_TOKENS)
        _require_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _require_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, -(1 << 63), MAX_SEED)
        _require_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}", "min_tokens")
        _require_int("n", self.n, 1, MAX_N)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} is not true or false", "ignore_eos")
        if not isinstance(self.stop, tuple) or len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop holds more than {MAX_STOP_STRINGS} strings or is not a list", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
                raise RequestError(f"each stop must be a string of 1..{MAX_STOP_BYTES} bytes", "stop")
        if not isinstance(self.stop_token_ids, tuple) or len(self.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(f"stop_token_ids holds more than {MAX_STOP_IDS} ids or is not a list", "stop_token_ids")
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, (1 << 31) - 1)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        values: dict[str, object] = {one.name: getattr(self, one.name) for one in fields(self)}
        values.update(changes)
        return SamplingParams(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to generate: what becomes one sequence. A client's n > 1 is n of these.

    request_id: unique among live requests. prompt: token ids, at least one. arrival_s: monotonic seconds.
    stop_ids: every id that ends this sequence (the model's eos list unless ignore_eos, and params.stop_token_ids).
    priority: lower runs first, ties by arrival; it never preempts what runs. tenant: what the keys of its encoded
    layers depend on beside the root secret (docs/scx.md); secret, so it has no text form.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival_s: float
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    tenant: bytes = field(default=b"", repr=False)
