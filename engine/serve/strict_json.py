"""Request bodies: strict JSON to plain objects, with depth and size checked before anything looks inside.

It knows no fields. NaN and Infinity, numbers beyond a float, invalid UTF-8, lone surrogates and trailing bytes are
refused (reliability rules R9, R13, R15); an integer keeps its full value, so that nothing is ever narrowed unseen.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from engine.serve.errors import ApiError, shown

MAX_DEPTH = 64
MAX_CONTAINERS = 65_536  # lists and objects; building them costs far more than their bytes
MAX_KEYS = 32_768
MAX_QUOTES = 400_000  # telling strings from structure takes time for each
MAX_MEMBERS = 1_200_000  # of all lists and objects together; most are token ids

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_decode = msgspec.json.Decoder().decode


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as an object of plain values. Raises ApiError 400 that says what is wrong and where."""
    if not body:
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    _check_counts(body)
    try:
        value = _decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "not valid UTF-8"
        raise ApiError(400, f"the body is not valid JSON: {reason[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {shown(value)}; send a JSON object", code="invalid_json")
    _check_shape(value)
    return value


def _check_counts(body: bytes) -> None:
    """Refuse by counting signs, before any object is made. Strings are left out only when the count demands it."""
    checks = ((b"[{", MAX_CONTAINERS, "lists and objects"), (b":", MAX_KEYS, "keys"), (b",", MAX_MEMBERS, "members"))
    bare = body
    for signs, limit, what in checks:
        if sum(bare.count(sign) for sign in _each(signs)) <= limit:
            continue
        if bare is body:
            if body.count(b'"') > MAX_QUOTES:
                raise ApiError(400, f"the body has more than {limit} {what} or more than {MAX_QUOTES} quotes, which is "
                                    "more than is looked at", code="invalid_json")  # fmt: skip
            bare = _STRINGS.sub(b"", body)
        found = sum(bare.count(sign) for sign in _each(signs))
        if found > limit:
            raise ApiError(400, f"the body has {found} {what}; at most {limit} are accepted", code="invalid_json")


def _each(signs: bytes) -> list[bytes]:
    return [signs[i : i + 1] for i in range(len(signs))]


def _check_shape(value: dict[str, Any]) -> None:
    """Depth, without recursion."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [inner for inner in item.values() if isinstance(inner, (dict, list))]
            else:
                below += [inner for inner in item if isinstance(inner, (dict, list))]
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
