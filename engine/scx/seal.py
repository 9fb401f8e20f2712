"""Keys and values that leave the device, sealed: AES-256-GCM bound to the place they came from.

The maps of a scheme are obfuscation; this is encryption with integrity, for copies that attention does not read where
they lie: swap, offload, disk, another machine. It knows bytes and places, neither tensors nor who stores them.

    kv key  = 32 bytes of the session's stream of purpose "seal" (HKDF-Expand of the session key)
    key     = HKDF-SHA256(ikm = kv key, salt = 32 random bytes, info = "scx/v1" | "seal")
    sealed  = version | salt | AES-256-GCM(key, nonce 0, plain, associated)
    associated = version | model | layer | range | epoch | side

Every seal has a key of its own, so one nonce is enough and no counter has to survive a crash, a fork of the session or
a second worker: a (key, nonce) pair comes twice only if 32 random bytes do. A nonce derived from the place would repeat
when a preempted request writes the same place again. Sources: RFC 5869 (HKDF), NIST SP 800-38D (GCM, section 8).
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from engine.scx.errors import ScxError
from engine.scx.keys import KEY_BYTES, SHARED_HEAD, VERSION, Label, Secret, SessionKeys

SEAL_VERSION = b"\x01"
SALT_BYTES = 32
TAG_BYTES = 16
NONCE = bytes(12)
OVERHEAD_BYTES = len(SEAL_VERSION) + SALT_BYTES + TAG_BYTES
SIDES = ("k", "v", "kv")
MAX_PLAIN_BYTES = (1 << 31) - 1  # what the library takes in one call


class SealError(ScxError):
    """Sealed bytes that were changed, cut, or brought to a place, session or epoch they were not sealed for."""


@dataclass(frozen=True, slots=True)
class KvPlace:
    """Where bytes belong. model: an identity of the model, any bytes; layer: its index; side: "k", "v" or "kv";
    first, last: token positions first..last - 1; epoch: how often the sequence restarted or its key was rotated.

    Raises ValueError for a number outside 0..2**32 - 1, an empty range or another side.
    """

    model: bytes
    layer: int
    first: int
    last: int
    epoch: int
    side: str = "kv"

    def __post_init__(self) -> None:
        for name in ("layer", "first", "last", "epoch"):
            if not 0 <= getattr(self, name) < 1 << 32:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..{(1 << 32) - 1}")
        if self.first >= self.last:
            raise ValueError(f"the range {self.first}..{self.last} holds no token; first must be below last")
        if self.side not in SIDES:
            raise ValueError(f"side={self.side!r} is not one of {', '.join(SIDES)}")

    def associated(self) -> bytes:
        """The place as bytes; no two places give the same."""
        numbers = struct.pack(">4I", self.layer, self.first, self.last, self.epoch)
        return b"".join((SEAL_VERSION, struct.pack(">I", len(self.model)), self.model, numbers, self.side.encode()))


class KvSealer:
    """Seals and opens under one session's key; whoever re-derives the session's keys can open. Clear it at the end.

    The library takes keys as immutable bytes, so a seal's own key lives in memory until it is overwritten; the
    session's stays in a buffer that clear() zeroes.
    """

    def __init__(self, keys: SessionKeys) -> None:
        words = keys.stream("seal", Label(0, SHARED_HEAD)).words(KEY_BYTES // 4)
        self._secret = Secret(bytearray(words.data.cast("B")))
        words.fill(0)

    def __repr__(self) -> str:
        return "<KvSealer>"

    def clear(self) -> None:
        """Forget the key; sealing and opening raise InvariantError from then on. Idempotent."""
        self._secret.clear()

    def _cipher(self, salt: bytes) -> AESGCM:
        key = bytearray(KEY_BYTES)
        HKDF(SHA256(), KEY_BYTES, salt, VERSION + b"seal").derive_into(self._secret.data, key)
        cipher = AESGCM(key)
        key[:] = bytes(KEY_BYTES)
        return cipher

    def seal(self, place: KvPlace, plain: bytes | bytearray | memoryview) -> bytes:
        """Encrypt and bind. plain: 0..MAX_PLAIN_BYTES bytes. Returns OVERHEAD_BYTES more than plain.

        Raises ValueError for more bytes than one call takes.
        """
        if len(plain) > MAX_PLAIN_BYTES:
            raise ValueError(f"{len(plain)} bytes are more than {MAX_PLAIN_BYTES}; seal a smaller range")
        salt = secrets.token_bytes(SALT_BYTES)
        return SEAL_VERSION + salt + self._cipher(salt).encrypt(NONCE, plain, place.associated())

    def open(self, place: KvPlace, sealed: bytes) -> bytes:
        """What was sealed for exactly this place. Raises SealError for anything else; no byte is returned then."""
        if len(sealed) < OVERHEAD_BYTES or sealed[:1] != SEAL_VERSION:
            raise SealError(f"{len(sealed)} bytes are not sealed KV of version {SEAL_VERSION[0]}")
        salt, body = sealed[1 : 1 + SALT_BYTES], sealed[1 + SALT_BYTES :]
        try:
            return self._cipher(salt).decrypt(NONCE, body, place.associated())
        except InvalidTag:
            raise SealError(
                f"sealed KV of layer {place.layer}, tokens {place.first}..{place.last} was changed or belongs elsewhere"
            ) from None
