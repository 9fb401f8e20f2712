"""Reads a request's body: content type, size, idle time and total time are limits, not hopes.

It does not know fields. A body is refused by its declared size before a byte is read, and by its real size as soon as
the limit is passed (reliability rules R11, R15, R30; fault F24).
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from engine.serve.errors import ApiError
from engine.serve.generation import ClientGone
from engine.serve.services import MAX_BODIES_BYTES, Services
from engine.serve.strict_json import parse_object

MAX_BODY_BYTES = 8 << 20
IDLE_S = 30.0
TOTAL_S = 120.0


async def read_json(request: Request, services: Services) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 400, 408, 413, 415 or 503."""
    _check_headers(request)
    body = bytearray()
    held = 0
    try:
        async with asyncio.timeout(TOTAL_S) as total:
            while True:
                async with asyncio.timeout(IDLE_S):
                    message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientGone
                part = message.get("body", b"")
                body += part
                services.bodies_bytes += len(part)
                held += len(part)
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large(f"more than {MAX_BODY_BYTES}")
                if services.bodies_bytes > MAX_BODIES_BYTES:
                    raise ApiError(503, "too many request bodies at once; try again a little later")
                if not message.get("more_body", False):
                    break
        return parse_object(bytes(body))
    except TimeoutError:
        what = f"was not whole after {TOTAL_S:.0f} s" if total.expired() else f"stopped for {IDLE_S:.0f} s"
        raise ApiError(408, f"the body {what}", headers=((b"connection", b"close"),)) from None
    finally:
        services.bodies_bytes -= held


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        shown = kind[:60] if kind.isascii() and kind.isprintable() else ""
        raise ApiError(415, f"content-type {shown!r} is not accepted; send application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, "a compressed body is not accepted; send it as it is")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 12 or int(declared) > MAX_BODY_BYTES):
        raise _too_large(declared[:20])


def _too_large(size: str) -> ApiError:
    return ApiError(413, f"the body has {size} bytes; at most {MAX_BODY_BYTES} are accepted")
