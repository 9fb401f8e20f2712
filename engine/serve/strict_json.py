"""Request bodies: strict JSON to plain objects, with depth and size checked before anything looks inside.

It knows no fields. NaN and Infinity, numbers beyond a float, invalid UTF-8, lone surrogates and trailing bytes are
refused (reliability rules R9, R13, R15); an integer keeps its full value, so that nothing is ever narrowed unseen.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.serve.errors import ApiError, shown

MAX_DEPTH = 64
MAX_KEYS = 32768

_decode = msgspec.json.Decoder().decode


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as an object of plain values. Raises ApiError 400 that says what is wrong and where."""
    if not body:
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
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


def _check_shape(value: dict[str, Any]) -> None:
    """Depth and number of object keys, without recursion. Lists of scalars are not walked into: their members cannot
    nest, and a long list of ids is checked by whoever expects ids."""
    level: list[Any] = [value]
    keys = 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                keys += len(item)
                below += [inner for inner in item.values() if isinstance(inner, (dict, list))]
            else:
                below += [inner for inner in item if isinstance(inner, (dict, list))]
        if keys > MAX_KEYS:
            raise ApiError(400, f"the body has more than {MAX_KEYS} keys", code="invalid_json")
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
