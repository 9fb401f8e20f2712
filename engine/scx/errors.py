"""What a secure side refuses, as types: callers end the requests concerned and never go on in plaintext.

    ScxError
    ├── UnknownSession    a slot without an open session, or one that is already open
    ├── OutOfOrder        rows that are not the next ones of their session; a map is applied to a row once
    ├── LayerNotEncoded   a layer outside the configuration
    ├── ShapeMismatch     a tensor whose size is not that of the scheduled rows
    ├── WorkerRefused     a secure worker that does not take this client, handshake or frame
    └── WorkerLost        a secure worker that is gone or silent, and with it the sessions that it held
"""

from __future__ import annotations

from engine.core.errors import TesseraError


class ScxError(TesseraError):
    """Base of the secure side's refusals. The message names slots, layers and positions, never contents."""


class UnknownSession(ScxError):
    """No session is open on that slot, or one already is."""


class OutOfOrder(ScxError):
    """The rows asked for are not the ones that were scheduled next."""


class LayerNotEncoded(ScxError):
    """The secure side has no keys for that layer."""


class ShapeMismatch(ScxError):
    """The tensor does not hold the scheduled rows."""


class WorkerRefused(ScxError):
    """The secure worker does not take this client, handshake or frame; it has hung up."""


class WorkerLost(ScxError):
    """The secure worker is gone or silent. Its sessions are over: requests that need them end with an error."""
