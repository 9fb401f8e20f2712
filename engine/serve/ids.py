"""Token ids in requests: whose they are, whether the vocabulary has them, what the engine calls them.

A model with a patched vocabulary has two id spaces, and a number does not say which it is of; so a request with ids
must (`token_space`), and nothing is guessed. On a plain model both are the same. It does not know what the ids do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.errors import RequestError
from engine.core.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from engine.serve.errors import bad, shown

SPACES = ("base", "engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server serves: names clients may use, tokens of one request, ids in 0..vocab_size-1.

    base_vocab_size: of a patched model, the number of base ids; None = a plain model. to_new_id: base id -> engine id,
    raises RequestError for one that has none.
    """

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    sampling_defaults: Mapping[str, float]
    base_vocab_size: int | None = None
    to_new_id: Callable[[int], int] = int

    def size_of(self, space: str) -> int:
        """Ids of a space are below it."""
        return self.vocab_size if space == "engine" else self.base_vocab_size or self.vocab_size


def take_space(fields: dict[str, Any], limits: Limits, with_ids: Sequence[str]) -> str:
    """"base" or "engine": `token_space`, which a patched model needs when fields hold ids. with_ids: which do.

    Always "engine" on a plain model. Raises ApiError.
    """
    value = fields.pop("token_space", None)
    if value is not None and value not in SPACES:
        raise bad("token_space", f"token_space={shown(value)} is not one of {', '.join(SPACES)}")
    if limits.base_vocab_size is None:
        return "engine"
    if value is None and with_ids:
        raise bad("token_space", f"{' and '.join(with_ids)} holds token ids, and this model has two vocabularies; say "
                                 'whose they are with token_space: "base" (the base tokenizer\'s) or "engine" (those '
                                 "that /tokenize gives as tokens)", "missing_required_parameter")
    return str(value or "engine")


def fields_with_ids(fields: Mapping[str, Any]) -> list[str]:
    """The fields of a request that hold ids."""
    prompt = fields.get("prompt")
    of_ids = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)
    return [*(["prompt"] if of_ids else []), *(name for name in ("stop_token_ids", "logit_bias") if fields.get(name))]


def take_text_ids(value: object, limits: Limits, param: str, space: str = "engine") -> list[int]:
    """take_ids of a text (a prompt), which must fit in the context."""
    assert isinstance(value, list)
    if space == "engine" and len(value) > limits.max_model_len:  # base ids may become fewer
        raise bad(param, f"{param} has {len(value)} tokens; the model's context is {limits.max_model_len} tokens",
                  "context_length_exceeded")
    return take_ids(value, limits, param, space)


def take_ids(value: object, limits: Limits, param: str, space: str = "engine") -> list[int]:
    """A list of token ids of a space, each a real integer inside the vocabulary; not converted yet."""
    assert isinstance(value, list)
    if set(map(type, value)) - {int}:
        wrong = next(item for item in value if type(item) is not int)
        raise bad(param, f"{param} holds {shown(wrong)}, which is not a token id (an integer)")
    size = limits.size_of(space)
    if value and not (min(value) >= 0 and max(value) < size):
        wrong = next(item for item in value if not 0 <= item < size)
        raise bad(param, f"{param} holds the id {shown(wrong)}; ids are 0..{size - 1}")
    return value


def take_stop_ids(fields: dict[str, Any], limits: Limits, space: str) -> tuple[int, ...]:
    """stop_token_ids, as engine ids."""
    value = fields.pop("stop_token_ids", None)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOP_IDS:
        raise bad("stop_token_ids", f"stop_token_ids={shown(value)} is not a list of at most {MAX_STOP_IDS} token ids")
    return tuple(_mapped(token, limits, "stop_token_ids", space)
                 for token in take_ids(value, limits, "stop_token_ids", space))


def take_logit_bias(fields: dict[str, Any], limits: Limits, space: str) -> dict[int, float]:
    """logit_bias, an object of ids (JSON has them as texts) and numbers, as engine ids."""
    value = fields.pop("logit_bias", None)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise bad("logit_bias", f"logit_bias={shown(value)} is not an object of at most {MAX_LOGIT_BIAS} token ids and "
                                "numbers")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and str(int(key)) == key):
            raise bad("logit_bias", f"logit_bias holds the key {shown(key)}, which is not a token id")
        (token,) = take_ids([int(key)], limits, "logit_bias", space)
        found[_mapped(token, limits, "logit_bias", space)] = bias  # SamplingParams checks the number
    return found


def _mapped(token: int, limits: Limits, param: str, space: str) -> int:
    """The engine's id. Raises ApiError for a base id that the patch removed."""
    if space == "engine":
        return token
    try:
        return limits.to_new_id(token)
    except RequestError as error:
        raise bad(param, f"{param}: {error}") from None
