"""What a client is told when something is wrong: OpenAI's error object, and the status code with it.

It knows no routes. A message names the field, its value and the limit; it never holds a prompt, a key or a repr of an
object of ours.
"""

from __future__ import annotations

from typing import Any

import msgspec

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error", 503: "server_error",
}  # fmt: skip
CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "timeout", 409: "conflict", 413: "request_too_large", 415: "unsupported_media_type", 431: "headers_too_large",
    500: "internal_error", 503: "unavailable",
}  # fmt: skip
SHOWN_CHARACTERS = 60


class ApiError(Exception):
    """Answer this request with `status` and an error object. headers: extra response headers."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}` as OpenAI spells it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(self.body())


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param, code or "invalid_value")


def shown(value: object) -> str:
    """A client's own value, short enough to quote back: scalars as JSON, anything else by its kind and size."""
    if isinstance(value, str):
        text = value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "..."
        return msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode()
    if value is None or isinstance(value, (bool, float)):
        return msgspec.json.encode(value).decode()
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 70 else "an integer of more than 70 bits"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return "a value of another kind"
