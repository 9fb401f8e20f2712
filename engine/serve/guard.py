"""The outermost ASGI layer: keys, draining, and the last resort for exceptions. Pure ASGI, so disconnects pass through.

It reads headers only: a request without a key is answered before a byte of its body is read (reliability rules R18,
R19). It knows a handful of paths by name; every other path needs the key when there is one.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from engine.serve.errors import ApiError
from engine.serve.services import Services, tenant_of

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/"})
ADMIN_PREFIX = "/admin/"
LOOPBACK = ("127.", "::1", "::ffff:127.")
FAULT = "the server failed on this request; the fault was counted"
RETRY_AFTER = (b"retry-after", b"5")


def error_headers(error: ApiError) -> list[tuple[bytes, bytes]]:
    """The headers that go with an error object, but for its length."""
    headers = [(b"content-type", b"application/json"), *error.headers]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 503:
        headers.append(RETRY_AFTER)
    return headers


async def answer_error(send: Send, error: ApiError) -> None:
    """Send an error object as the whole response."""
    body = error.encoded()
    headers = [*error_headers(error), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bearer_key(scope: MutableMapping[str, Any]) -> bytes | None:
    """The key of the one Authorization header, its scheme in any case; None when there is none, or more than one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None


class Guard:
    """Wraps the application. The only place that decides who may call what."""

    def __init__(self, app: App, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.services.metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        try:
            self._check_access(scope)
            await self.app(scope, receive, watched_send)
        except ApiError as error:
            if not started:
                await answer_error(watched_send, error)
        except Exception as error:  # one request's fault ends that request; the application has answered it
            self._count(error)
            if not started:
                await answer_error(watched_send, ApiError(500, FAULT))

    def _check_access(self, scope: MutableMapping[str, Any]) -> None:
        """Raise 401, 403 or 503; return for a request that may be handled."""
        services, path = self.services, scope["path"]
        given = bearer_key(scope)
        if path == "/metrics" and services.metrics_keys:
            if not services.metrics_keys.accept(given):
                raise ApiError(401, "a metrics key is needed: Authorization: Bearer KEY")
        elif path.startswith(ADMIN_PREFIX) and services.admin_keys:
            if not services.admin_keys.accept(given):
                raise ApiError(401, "an admin key is needed: Authorization: Bearer KEY")
            peer = scope.get("client")
            if peer is None or not peer[0].startswith(LOOPBACK):
                raise ApiError(403, "admin routes answer on the loopback interface only")
        elif services.api_keys and path not in OPEN_PATHS:
            if given is None or not services.api_keys.accept(given):
                raise ApiError(401, "no valid API key was given: Authorization: Bearer KEY")
            scope["tenant"] = tenant_of(given)
        if services.draining and path not in OPEN_PATHS:
            raise ApiError(503, "the server is shutting down; try again on another or a little later", code="draining")

    def _count(self, error: Exception) -> None:
        """Count a fault of ours and log where it was; its message may quote a client, so it stays unsaid."""
        self.services.metrics.failures.inc()
        frames = traceback.extract_tb(error.__traceback__)
        at = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
        log.error("a request failed: %s at %s", type(error).__name__, at)
