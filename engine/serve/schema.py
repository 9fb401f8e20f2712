"""Bodies of the OpenAI routes to typed requests: every field known, every number bounded, nothing ignored unsaid.

It does not tokenise, and it knows the model only by its name and limits. A field that is not built is refused unless
it asks for what happens anyway (`n=1`, `logprobs=false`, an empty tool list); a field that is unknown is refused by
name. See docs/api.md for the lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.core.errors import RequestError
from engine.core.request import MAX_ABS_PRIORITY, MAX_LOGPROBS, SamplingParams
from engine.serve.errors import ApiError, bad, shown
from engine.serve.ids import Limits, fields_with_ids, take_logit_bias, take_space, take_stop_ids, take_text_ids

MAX_PROMPTS = 1024
MAX_SAMPLES = 1024  # n x prompts
MAX_PROMPT_IDS = 1 << 20  # over all prompts of a request
MAX_TOTAL_TOKENS = 1 << 23  # n x prompts x max_tokens
MAX_TOTAL_LOGPROBS = 1 << 22  # that, times (logprobs + 1)
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_NAME_CHARACTERS = 256
LEAST_TEMPERATURE = 1e-5  # below it, logits / temperature leaves float32: that is argmax

# Accepted and without effect here: they address an account or a cache, not the answer.
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _is_off(value: object) -> bool:
    return value is None or value is False


def _is_zero(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0)


def _is_one(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1)


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {})


# Fields that are not built: name -> whether a value asks for nothing.
NEUTRAL: Mapping[str, Callable[[object], bool]] = {
    "frequency_penalty": _is_zero, "presence_penalty": _is_zero, "repetition_penalty": _is_one,
    "length_penalty": _is_one, "best_of": _is_one, "suffix": _is_empty, "echo": _is_off,
    "top_logprobs": lambda value: value is None, "use_beam_search": _is_off, "bad_words": _is_empty,
    "tools": _is_empty, "functions": _is_empty, "tool_choice": lambda value: value in (None, "none", "auto"),
    "function_call": lambda value: value in (None, "none", "auto"),
    "parallel_tool_calls": lambda value: value is None or isinstance(value, bool),
    "response_format": lambda value: value is None or value == {"type": "text"},
    "modalities": lambda value: value is None or value == ["text"], "audio": _is_empty, "prediction": _is_empty,
    "reasoning_effort": lambda value: value is None, "verbosity": lambda value: value is None,
    "web_search_options": _is_empty, "chat_template": lambda value: value is None, "chat_template_kwargs": _is_empty,
    "guided_json": _is_empty, "guided_regex": _is_empty, "guided_choice": _is_empty, "guided_grammar": _is_empty,
    "prompt_embeds": _is_empty, "prompt_logprobs": _is_empty, "extra_body": _is_empty,
    "skip_special_tokens": lambda value: value in (None, True), "add_generation_prompt": lambda v: v in (None, True),
    "continue_final_message": _is_off, "documents": _is_empty, "mm_processor_kwargs": _is_empty,
}  # fmt: skip
WHY = {
    "bad_words": "many sequences of tokens spell the same text, and a ban of single ids would not hold; use logit_bias "
                 "for ids, or stop",
}  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "min_tokens", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to generate: prompts or messages. params.max_tokens None = what is left of the context.

    token_space: whose ids prompts holds; all others are the engine's by now. echo: the answer begins with the prompt.
    max_base_tokens: the answer ends with the token that brings what it stands for to so many base tokens.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    messages: list[dict[str, str]] | None
    params: SamplingParams
    max_tokens_given: bool
    stream: bool
    include_usage: bool
    priority: int
    token_space: str
    echo: bool = False
    max_base_tokens: int | None = None

    @property
    def chat(self) -> bool:
        """Whether this is a chat completion."""
        return self.messages is not None


def parse_completion(body: dict[str, Any], limits: Limits) -> Ask:
    """POST /v1/completions. Raises ApiError naming field, value and limit."""
    fields = dict(body)
    model = take_model(fields, limits)
    space = take_space(fields, limits, fields_with_ids(fields))
    prompts = take_prompts(fields.pop("prompt", None), limits, space)
    logprobs = fields.pop("logprobs", None)
    logprobs = None if logprobs is False else logprobs
    echo = _flag(fields, "echo")
    if echo and logprobs is not None:
        raise bad("echo", "echo with logprobs needs logprobs of the prompt's tokens, which are not computed; drop one",
                  "unsupported_parameter")
    return _finish(fields, limits, model, prompts, None, space, logprobs, echo)


def parse_chat(body: dict[str, Any], limits: Limits) -> Ask:
    """POST /v1/chat/completions. Raises ApiError naming field, value and limit."""
    fields = dict(body)
    model = take_model(fields, limits)
    messages = take_messages(fields.pop("messages", None))
    newer = fields.pop("max_completion_tokens", None)
    if newer is not None:
        if fields.get("max_tokens") not in (None, newer):
            raise bad("max_completion_tokens", f"max_completion_tokens={shown(newer)} contradicts "
                                               f"max_tokens={shown(fields['max_tokens'])}; give one")
        fields["max_tokens"] = newer
    space = take_space(fields, limits, fields_with_ids(fields))
    wanted, logprobs = _flag(fields, "logprobs"), fields.pop("top_logprobs", None)
    if logprobs is not None and not wanted:
        raise bad("top_logprobs", "top_logprobs needs logprobs=true")
    return _finish(fields, limits, model, (), messages, space, (logprobs or 0) if wanted else None)


def take_model(fields: dict[str, Any], limits: Limits) -> str:
    """The name the client used; without one, this server's only model. Raises 404 for another."""
    name = fields.pop("model", None)
    if name is None:
        return limits.model_names[0]
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARACTERS:
        raise bad("model", f"model={shown(name)} is not a text of at most {MAX_NAME_CHARACTERS} characters")
    if name not in limits.model_names:
        raise ApiError(404, f"model {shown(name)} does not exist; served: {', '.join(limits.model_names)}", "model",
                       "model_not_found")
    return name


def take_prompts(value: object, limits: Limits, space: str = "engine") -> tuple[str | list[int], ...]:
    """Text, list of texts, ids of a space, or list of lists of ids."""
    if isinstance(value, str):
        many: list[Any] = [value]
    elif isinstance(value, list) and value:
        many = value if isinstance(value[0], (str, list)) else [value]
    else:
        raise bad("prompt", f"prompt={shown(value)} is not a text, a list of texts, a list of token ids or a list of "
                            "such lists, with at least one member")
    if len(many) > MAX_PROMPTS:
        raise bad("prompt", f"prompt has {len(many)} prompts; at most {MAX_PROMPTS} are allowed")
    if {type(item) for item in many} not in ({str}, {list}):
        raise bad("prompt", "prompt mixes texts, lists and other values; all must be of one kind")
    if isinstance(many[0], list) and sum(map(len, many)) > MAX_PROMPT_IDS:
        raise bad("prompt", f"prompt has {sum(map(len, many))} ids in all; at most {MAX_PROMPT_IDS} are allowed")
    prompts = []
    for item in many:
        if not item:
            raise bad("prompt", "prompt is empty; at least one token is needed")
        prompts.append(item if isinstance(item, str) else take_text_ids(item, limits, "prompt", space))
    return tuple(prompts)


def take_messages(value: object) -> list[dict[str, str]]:
    """Messages as the template wants them: role and content (and name), all texts."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise bad("messages", f"messages={shown(value)} is not a list of 1..{MAX_MESSAGES} messages")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(item: object, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise bad("messages", f"{where} is {shown(item)}, not an object with role and content")
    fields = dict(item)
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise bad("messages", f"{where}.role={shown(role)} is not one of {', '.join(ROLES)}")
    message = {"role": ROLES[role], "content": _content(fields.pop("content", None), where)}
    name = fields.pop("name", None)
    if name is not None:
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARACTERS:
            raise bad("messages", f"{where}.name is not a text of at most {MAX_NAME_CHARACTERS} characters")
        message["name"] = name
    for key, extra in fields.items():
        if key not in ("tool_calls", "function_call", "refusal", "audio", "annotations") or not _is_empty(extra):
            raise bad("messages", f"{where}.{shown(key)[1:-1]} is not supported; a message has role, content and name")
    return message


def _content(value: object, where: str) -> str:
    """A text, or text parts joined by newlines. Any other kind of part is refused: nothing is fetched or decoded."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise bad("messages", f"{where}.content={shown(value)} is not a text or a list of 1..{MAX_PARTS} text parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise bad("messages", f"{where}.content[{index}] has type {shown(kind)}; only text parts are supported")
        text = part.get("text")
        if not isinstance(text, str) or set(part) != {"type", "text"}:
            raise bad("messages", f"{where}.content[{index}] must have exactly type and text, and text must be a text")
        texts.append(text)
    return "\n".join(texts)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"{name}={shown(value)} is not true or false")
    return bool(value)


def _stream(fields: dict[str, Any]) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = _flag(fields, "stream")
    options = fields.pop("stream_options", None)
    if options is None:
        return stream, False
    if not stream:
        raise bad("stream_options", "stream_options needs stream=true")
    if not isinstance(options, dict):
        raise bad("stream_options", f"stream_options={shown(options)} is not an object")
    rest = dict(options)
    include_usage = _flag(rest, "include_usage")
    if _flag(rest, "continuous_usage_stats"):
        raise bad("stream_options", "stream_options.continuous_usage_stats is not supported; use include_usage")
    _flag(rest, "include_obfuscation")  # padding against observers of packet sizes; harmless to leave out
    if rest:
        raise bad("stream_options", f"stream_options.{shown(next(iter(rest)))[1:-1]} is unknown; known: include_usage")
    return stream, include_usage


def _stop(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.pop("stop", None)
    many = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(many, list):
        raise bad("stop", f"stop={shown(value)} is not a text or a list of texts")
    return tuple(many)  # SamplingParams checks number, kind and length


def _max_base_tokens(fields: dict[str, Any]) -> int | None:
    value = fields.pop("max_base_tokens", None)
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_TOTAL_TOKENS):
        raise bad("max_base_tokens", f"max_base_tokens={shown(value)} is not an integer in 1..{MAX_TOTAL_TOKENS}")
    return value


def _priority(fields: dict[str, Any]) -> int:
    value = fields.pop("priority", None)
    if value is None:
        return 0
    if type(value) is not int or abs(value) > MAX_ABS_PRIORITY:
        raise bad("priority", f"priority={shown(value)} is not an integer in {-MAX_ABS_PRIORITY}..{MAX_ABS_PRIORITY}")
    return value


def _refuse_rest(fields: dict[str, Any]) -> None:
    """Whatever nobody took: harmless, asking for nothing, or refused."""
    for name, value in fields.items():
        if name in HARMLESS:
            continue
        neutral = NEUTRAL.get(name)
        if neutral is None:
            raise bad(str(shown(name))[1:-1], f"field {shown(name)} is unknown", "unknown_parameter")
        if not neutral(value):
            why = WHY.get(name, "leave it out")
            raise bad(name, f"{name}={shown(value)} is not supported by this server; {why}", "unsupported_parameter")


def _finish(
    fields: dict[str, Any],
    limits: Limits,
    model: str,
    prompts: tuple[str | list[int], ...],
    messages: list[dict[str, str]] | None,
    space: str,
    logprobs: object,
    echo: bool = False,
) -> Ask:
    """The fields both routes share."""
    stream, include_usage = _stream(fields)
    priority = _priority(fields)
    max_tokens, base_tokens = fields.pop("max_tokens", None), _max_base_tokens(fields)
    given: dict[str, Any] = dict(limits.sampling_defaults)
    given |= {name: value for name in SAMPLING if (value := fields.pop(name, None)) is not None}
    unlimited = messages is not None or base_tokens is not None
    given["max_tokens"] = max_tokens if max_tokens is not None else (None if unlimited else 16)
    if max_tokens is None and type(given.get("min_tokens")) is int and not unlimited:
        given["max_tokens"] = max(16, min(given["min_tokens"], limits.max_model_len))
    given["stop"] = _stop(fields)
    given["stop_token_ids"] = take_stop_ids(fields, limits, space)
    given["logit_bias"] = take_logit_bias(fields, limits, space)
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MAX_LOGPROBS):
        name = "logprobs" if messages is None else "top_logprobs"
        raise bad(name, f"{name}={shown(logprobs)} is not an integer in 0..{MAX_LOGPROBS}")
    given["logprobs"] = logprobs
    _refuse_rest(fields)
    for name in ("temperature", "top_p", "top_k", "min_p", "n", "seed", "min_tokens", "max_tokens"):
        value = given.get(name)
        if (type(value) is int and abs(value) >= 1 << 70) or isinstance(value, (str, list, dict)):
            raise bad(name, f"{name}={shown(value)} is not a number this field can have")
    try:
        params = SamplingParams(**given)
    except RequestError as error:
        raise bad(error.param or "body", str(error)) from None
    if params.temperature < LEAST_TEMPERATURE:
        params = params.replace(temperature=0.0)
    _check_products(params, max(1, len(prompts)), limits)
    return Ask(model, prompts, messages, params, max_tokens is not None, stream, include_usage, priority, space, echo,
               base_tokens)  # fmt: skip


def _check_products(params: SamplingParams, prompts: int, limits: Limits) -> None:
    """Small numbers can make large ones (R11)."""
    if params.max_tokens is not None and params.max_tokens > limits.max_model_len:
        raise bad("max_tokens", f"max_tokens={params.max_tokens} is above the model's context of "
                                f"{limits.max_model_len} tokens", "context_length_exceeded")
    if params.n * prompts > MAX_SAMPLES:
        raise bad("n", f"n={params.n} times {prompts} prompts is {params.n * prompts} samples; at most {MAX_SAMPLES}")
    total = params.n * prompts * (params.max_tokens or limits.max_model_len)
    if total > MAX_TOTAL_TOKENS:
        raise bad("max_tokens", f"n x prompts x max_tokens is {total} tokens; at most {MAX_TOTAL_TOKENS}")
    if params.logprobs is not None and total * (params.logprobs + 1) > MAX_TOTAL_LOGPROBS:
        raise bad("max_tokens", f"n x prompts x max_tokens is {total} tokens with {params.logprobs + 1} logprobs each; "
                                f"at most {MAX_TOTAL_LOGPROBS} in all")
