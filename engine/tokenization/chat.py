"""A model's chat template, rendered in a sandbox: ChatTemplate.

The template is data of the model folder (or of the operator), never of a request; it can neither load other
templates nor reach Python objects, and its output is bounded. A caller that renders for strangers still does so in
a process it can kill: no sandbox bounds time (rule R6). It does not tokenise.
Helpers and block trimming are what Hugging Face templates are written for (transformers' chat templating).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from engine.core.clock import wall_s
from engine.core.errors import LoadError, RequestError
from engine.tokenization.jsonfile import read_bytes
from engine.tokenization.vocabulary import Part

MAX_TEMPLATE_BYTES = 64 << 10
MAX_RENDERED_CHARS = 64 << 20
MAX_REPEATED_ITEMS = 1 << 20
MAX_DEPTH = 32


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox without a loader, and without products and powers of any size."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse `'x' * 10**9` and `9**9**9` before they take the memory."""
        if operator == "**":
            if not all(isinstance(side, (int, float)) and abs(side) <= 1024 for side in (left, right)):
                raise jinja2.exceptions.SecurityError("a power with a side above 1024")
        else:
            for some, times in ((left, right), (right, left)):
                if isinstance(some, (str, list, tuple)) and isinstance(times, int):
                    if len(some) * times > MAX_REPEATED_ITEMS:
                        raise jinja2.exceptions.SecurityError(f"a repetition above {MAX_REPEATED_ITEMS} items")
                elif isinstance(some, int) and some.bit_length() > 4096:
                    raise jinja2.exceptions.SecurityError("a product of huge numbers")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """namespace() that holds no underscored names, the way to Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:  # no named self: a template may store an item called self
        names = dict(*args[1:], **values)
        if any(str(name).startswith("_") for name in names):
            raise jinja2.exceptions.SecurityError("a namespace with an underscored name")
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace with an underscored name")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    """A template refuses the messages."""
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    """The local time in a layout of strftime."""
    return datetime.datetime.fromtimestamp(wall_s()).strftime(layout)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of plain JSON types alone. Raises RequestError for anything else, or too deep."""
    if depth > MAX_DEPTH:
        raise RequestError(f"messages are nested more than {MAX_DEPTH} deep", "messages")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise RequestError(f"messages hold a {type(value).__name__}; allowed: text, numbers, lists and objects", "messages")


class ChatTemplate:
    """A compiled template. source: its text, at most 64 KiB; named_specials: bos_token, eos_token, ... for it."""

    def __init__(self, source: str, named_specials: Mapping[str, str], origin: str = "chat template") -> None:
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise LoadError(f"{origin}: the chat template has more than {MAX_TEMPLATE_BYTES} bytes")
        self.source = source
        self._named = dict(named_specials)
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        sandbox.filters["tojson"] = _tojson
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now,
                            "namespace": _Namespace}
        try:
            self._template = sandbox.from_string(source)
        except (jinja2.exceptions.TemplateError, RecursionError, ValueError, SyntaxError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise LoadError(f"{origin}: the chat template cannot be compiled: {reason}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. messages: objects with `role` and usually `content`; keys that are None count
        as absent. Raises RequestError when the template refuses them, fails, or writes too much."""
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("messages must be a list of at least one object", "messages")
        plain = [{key: value for key, value in _plain(message).items() if value is not None} for message in messages]
        parts: list[str] = []
        room = MAX_RENDERED_CHARS
        try:
            for part in self._template.generate(messages=plain, tools=None, documents=None,
                                                add_generation_prompt=add_generation_prompt, **self._named):
                room -= len(part)
                if room < 0:
                    raise RequestError(f"the rendered messages have more than {MAX_RENDERED_CHARS} characters",
                                       "messages")
                parts.append(part)
        except RequestError:
            raise
        except jinja2.exceptions.SecurityError:
            raise RequestError("the model's chat template tries something it may not", "messages") from None
        except jinja2.exceptions.TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {str(error)[:300]}",
                               "messages") from None
        except Exception as error:  # a template is code: it may fail in any way on messages it did not expect
            raise RequestError(f"the model's chat template cannot render these messages ({type(error).__name__})",
                               "messages") from None
        return "".join(parts)


    def parts(self, messages: Sequence[Mapping[str, Any]], specials: re.Pattern[str], firm: frozenset[str],
              add_generation_prompt: bool = True) -> list[Part]:
        """render(), cut where the template's text and the messages' meet; joined, the parts are render()'s text.

        specials: finds special strings; firm: those of special tokens (the others are marks that templates may look
        for in messages). The messages are rendered again with unguessable digits around every text; where the result
        without the digits is the same, they show what came from a message. A template that changes texts (or decides
        by them) defeats this; then only the special strings in messages are marked, and what cannot be told apart is
        refused. Raises RequestError.
        """
        whole = self.render(messages, add_generation_prompt)
        plain = [_plain(message) for message in messages]
        digits = f"{secrets.randbits(128):039d}"  # digits: they survive upper, lower, strip and tojson

        def attempt(change: Callable[[int, str], str]) -> str:
            """The rendering of changed messages; "" when the template will not have them."""
            changed = [_changed(message, specials, functools.partial(change, index))
                       for index, message in enumerate(plain)]
            try:
                return self.render(changed, add_generation_prompt)
            except RequestError:
                return ""

        def surplus(parts: list[Part]) -> set[str]:
            """Special strings that more of the template's parts hold than it writes around mere digits."""
            bare = Counter(specials.findall(attempt(lambda _, text: digits if text.strip() else text)))
            written = Counter(name for text, ours in parts if ours for name in specials.findall(text))
            return set(written - bare)

        cut = re.split(f"{digits}([01])", attempt(lambda _, text: _between(text, digits + "0", digits + "1")))
        if "".join(cut[::2]) == whole and cut[1::2] == ["0", "1"] * (len(cut) // 4):
            found = [Part(text, number % 2 == 0) for number, text in enumerate(cut[::2]) if text]
            harmless = not any(specials.search(text) for text in _texts(plain))
            if harmless or not surplus(found):  # a template may have cut the middle out of a text, without our digits
                return found
        found = _marked(plain, whole, specials, firm, digits, attempt)
        if surplus(found) & firm:
            raise _untold("a special token's text")
        return found


def _texts(value: Any) -> Iterator[str]:
    """Every text of a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _changed(value: Any, specials: re.Pattern[str], change: Callable[[str], str]) -> Any:
    """A copy of a message with every text changed but roles, types and keys, which templates compare.

    Raises RequestError when one of these holds a special string.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, specials, change) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key in ("role", "type") and isinstance(item, str)}
    if any(specials.search(text) for text in (*value, *kept.values())):
        raise RequestError("a role, type or key of a message holds a special token's text; leave it out", "messages")
    return {key: kept[key] if key in kept else _changed(item, specials, change) for key, item in value.items()}


def _between(text: str, begin: str, end: str) -> str:
    """The text with marks inside its outer whitespace, so that trimming it trims the same; unchanged when blank."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return text[:start] + begin + core + end + text[start + len(core) :]


def _marked(messages: list[Any], whole: str, specials: re.Pattern[str], firm: frozenset[str], digits: str,
            attempt: Callable[[Callable[[int, str], str]], str]) -> list[Part]:
    """The rendering in which each special string of a message is a part of its own. A string that the template itself
    looks for in that message (its rendering changes without) stays as it is, unless it is a special token's."""
    pairs = list(dict.fromkeys((index, name) for index, message in enumerate(messages)
                               for text in _texts(message) for name in specials.findall(text)))
    names = list(dict.fromkeys(name for _, name in pairs))

    def cut(placed: set[tuple[int, str]]) -> list[Part]:
        def change(index: int, text: str) -> str:
            return specials.sub(lambda found: f"{digits}{names.index(found[0]):04d}" if (index, found[0]) in placed
                                else found[0], text)

        pieces = re.split(f"{digits}([0-9]{{4}})", attempt(change) if placed else whole)
        pieces[1::2] = [names[int(number)] if int(number) < len(names) else "" for number in pieces[1::2]]
        return [Part(text, number % 2 == 0) for number, text in enumerate(pieces) if text]

    def is_right(parts: list[Part]) -> bool:
        return "".join(part.text for part in parts) == whole

    everything = cut(set(pairs))
    if is_right(everything):
        return everything
    placed: set[tuple[int, str]] = set()
    for pair in pairs:
        if is_right(cut({*placed, pair})):
            placed.add(pair)
        elif pair[1] in firm:
            raise _untold(repr(pair[1]))
    return cut(placed)


def _untold(what: str) -> RequestError:
    return RequestError(f"the model's chat template rewrites its messages, and they hold {what}: it cannot be told "
                        "which of the two wrote it; leave it out", "messages")


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's template: chat_template.jinja, else tokenizer_config.json's (of several, the one named default).

    Raises LoadError for one that is too large or not a text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise LoadError(f"{file}: is not UTF-8") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise LoadError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list with one "
                        "named default")
    return found
