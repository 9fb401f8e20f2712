"""What a secure side refuses, as types: callers end the requests concerned and never go on in plaintext.

    ScxError
    ├── UnknownSession    a slot without an open session, or one that is already open
    ├── OutOfOrder        rows that are not the next ones of their session; a map is applied to a row once
    ├── LayerNotEncoded   a layer outside the configuration
    └── ShapeMismatch     a tensor whose size is not that of the scheduled rows
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
