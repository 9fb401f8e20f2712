"""Seeds for requests that bring none. It knows no requests: it counts."""

from __future__ import annotations

import hashlib
import itertools


class SeedSource:
    """The n-th seed it gives is always the same for one `seed`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = itertools.count()

    def next(self) -> int:
        """A 64-bit seed."""
        name = f"{self._seed}:{next(self._count)}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
