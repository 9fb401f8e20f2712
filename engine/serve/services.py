"""What the routes share: the engine, the text workers, the model's limits, the keys, and whether we are draining.

It holds state and answers questions about it; it serves no route itself.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.core.clock import wall_s
from engine.core.config import ServerConfig
from engine.serve.engine_client import EngineClient
from engine.serve.generation import Tools
from engine.serve.ids import Limits
from engine.serve.metrics import Metrics
from engine.serve.text_pool import TextPool

MAX_BODIES_BYTES = 256 << 20  # request bodies held at once, over all clients


class Keys:
    """A set of bearer keys, kept as digests. Empty: no key is asked for (the caller decides what that means)."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, given: bytes | None) -> bool:
        """Whether this is one of the keys; takes the same time whichever it is, and however wrong."""
        digest = hashlib.sha256(given or b"").digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found and given is not None


def tenant_of(key: bytes) -> bytes:
    """The secret of whoever holds this API key, which the keys of encoded layers are made of (docs/scx.md). 32 bytes,
    from which the API key cannot be computed."""
    return hmac.digest(key, b"tessera tenant v1", "sha256")


@dataclass(slots=True)
class Services:
    """One server's shared state. tools, limits and text are there once the engine is ready."""

    config: ServerConfig
    metrics: Metrics
    api_keys: Keys
    admin_keys: Keys
    metrics_keys: Keys
    engine: EngineClient | None = None
    tools: Tools | None = None
    limits: Limits | None = None
    text: TextPool | None = None
    draining: bool = False
    generating: int = 0  # HTTP requests that are being generated
    reserved_samples: int = 0  # samples admitted by the server and not yet ended
    bodies_bytes: int = 0
    loop_lag_s: float = 0.0
    dropped_lines: Callable[[], int] = int  # log lines that could not be written
    card_extra: dict[str, Any] = field(default_factory=dict)  # of a model's card
    created_s: int = field(default_factory=lambda: int(wall_s()))

    @property
    def state(self) -> str:
        """starting, ready, stalled or dead."""
        if self.tools is None and self.engine is not None and self.engine.state == "ready":
            return "starting"
        return self.engine.state if self.engine is not None else "starting"
