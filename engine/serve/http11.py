"""uvicorn's h11 protocol with the limits it lacks: header bytes and count, chunk count, slow headers, dead transports.

It knows no routes. Only with h11 does the size of a header have a bound at all, so the server never uses another
parser (reliability rules R14, R15; faults F10, F24). Errors at this level have OpenAI's error object too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from engine.serve.errors import ApiError

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_BODY_EVENTS = 4096  # chunks of a body; parsing costs time for each, however small
HEADER_DEADLINE_S = 10.0
REST_OF_BODY_S = 2.0  # how long an answered request may go on sending
LAST_WRITE_S = 10.0


class LimitedConnection(h11.Connection):
    """An h11 server connection that counts: raises RemoteProtocolError with the status to answer."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._body_events = 0

    def next_event(self) -> Any:
        """The next event, or the refusal of one too many."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._body_events = 0
            _check_headers(event)
        elif isinstance(event, h11.Data):
            self._body_events += 1
            if self._body_events > MAX_BODY_EVENTS:
                raise h11.RemoteProtocolError(f"the body has more than {MAX_BODY_EVENTS} chunks", 413)
        return event


def _check_headers(event: h11.Request) -> None:
    names = [name for name, _ in event.headers]
    size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
    if len(names) > MAX_HEADERS:
        raise h11.RemoteProtocolError(f"{len(names)} headers; at most {MAX_HEADERS} are allowed", 431)
    if size > MAX_HEADER_BYTES:
        raise h11.RemoteProtocolError(f"{size} bytes of headers; at most {MAX_HEADER_BYTES} are allowed", 431)
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding; send one", 400)


class GuardedProtocol(H11Protocol):
    """One client connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = LimitedConnection()
        self._header_timer: asyncio.TimerHandle | None = None
        self._hanging_up = False

    def connection_made(self, transport: Any) -> None:
        """A client connected: its first header must be whole within HEADER_DEADLINE_S."""
        super().connection_made(transport)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; between requests the first byte starts the header's clock."""
        if self._hanging_up:
            return
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._await_header()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def handle_events(self) -> None:
        """As uvicorn's; the application can reach the transport, to drop a client that never reads."""
        super().handle_events()
        if self.scope is not None:
            self.scope["tessera.drop"] = self._drop  # type: ignore[typeddict-unknown-key]

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this while it handles h11's complaint; ours says what was wrong."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        known = status in (413, 431)
        message = str(error or msg)[:200]
        self._answer(ApiError(status if known else 400, f"not an HTTP request that is served here: {message}",
                              code=None if known else "invalid_http"))

    def on_response_complete(self) -> None:
        """An answered client that is still sending may finish within a moment, so that it can read the answer."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            cycle = self.cycle
            self.loop.call_later(REST_OF_BODY_S, self._drop_if_unread, cycle)

    def timeout_keep_alive_handler(self) -> None:
        """Idle long enough: close, and do not wait for ever for bytes that nobody reads."""
        with contextlib.suppress(h11.LocalProtocolError):
            super().timeout_keep_alive_handler()
        self.loop.call_later(LAST_WRITE_S, self._drop)

    def shutdown(self) -> None:
        """The server is ending. A connection in any state may be told so."""
        with contextlib.suppress(h11.LocalProtocolError):
            super().shutdown()

    def _drop_if_unread(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self._drop()

    def _drop(self) -> None:
        """Forget the client and whatever is still buffered for it."""
        if self.transport is not None:
            self.transport.abort()

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_DEADLINE_S, self._header_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_late(self) -> None:
        self._header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._answer(ApiError(408, f"the header was not whole after {HEADER_DEADLINE_S:.0f} s"))
        else:
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Answer outside the application, then let the client finish sending for a moment, unread, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.encoded()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                       (b"connection", b"close")]  # fmt: skip
            reason = STATUS_PHRASES.get(error.status, b"")
            for event in (h11.Response(status_code=error.status, headers=headers, reason=reason),
                          h11.Data(data=body), h11.EndOfMessage()):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever the application still says has nowhere to go
            self.cycle.message_event.set()
        self._hanging_up = True
        self._stop_header_timer()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(REST_OF_BODY_S, self._drop)
