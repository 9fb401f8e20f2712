"""Keys: a root secret, a session's key from it, and from that every permutation and matrix, by name.

    session = HKDF-SHA256(salt = nonce, ikm = tenant | root, info = "scx/v1" | "session" | epoch)
    subkey  = HKDF-Expand(session, "scx/v1" | model | scheme | epoch | segment | layer | global KV head | purpose)
    stream  = ChaCha20(subkey) as 32-bit words

What is drawn from a stream is unbiased (words that would favour a value are thrown away). Nothing is kept beyond its
session; keys and the words of permutations are cleared when they are no longer needed, but what numpy, torch and
OpenSSL copy on the way is not reached: freed memory may hold pieces of maps. numpy's and torch's generators take no
part.
No key, stream or table has a text form. It knows no tensors of a model, and no schedule. Many labels at once are drawn
in C++ (kernels/key_draws.py), the same words to the last bit.
Sources: RFC 5869 (HKDF), RFC 8439 (ChaCha20), Fisher and Yates in Durstenfeld's form.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from engine.core.errors import ConfigError, InvariantError
from tessera_kernels import key_draws

VERSION = b"scx/v1"
KEY_BYTES = 32
WORDS = 1 << 32
SHARED_HEAD = 0xFFFFFFFF  # the head of what all heads share


class Secret:
    """Bytes that can be cleared and are never shown."""

    __slots__ = ("_data",)

    def __init__(self, data: bytearray) -> None:
        self._data = data

    @property
    def data(self) -> bytearray:
        """The bytes themselves. Raises InvariantError once cleared: no key must never work like an empty key."""
        if not self._data:
            raise InvariantError("a secret is used after it was cleared")
        return self._data

    def __repr__(self) -> str:
        return "<Secret>"

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not copied or sent")

    def clear(self) -> None:
        """Overwrite with zeros; it cannot be used afterwards. Idempotent."""
        self._data[:] = bytes(len(self._data))
        del self._data[:]


def fresh_root() -> Secret:
    """A random root for the life of this process."""
    return Secret(bytearray(secrets.token_bytes(KEY_BYTES)))


def read_root(path: str) -> Secret:
    """The root secret of a file: 64 hexadecimal digits (`openssl rand -hex 32`), readable by its owner only.

    Raises ConfigError naming the file and what is wrong; never its contents.
    """
    problem = f"--scx-key-file {path}: "
    digits = bytearray(2 * KEY_BYTES + 2)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except OSError as error:
        raise ConfigError(problem + (error.strerror or "cannot be read")) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(problem + "is not a file")
        if status.st_mode & 0o077:
            raise ConfigError(problem + f"others may read it (mode {stat.S_IMODE(status.st_mode):o}); chmod 600")
        count = os.readv(descriptor, [digits])
        secret = bytearray(KEY_BYTES)
        good = count in (2 * KEY_BYTES, 2 * KEY_BYTES + 1) and digits[2 * KEY_BYTES : count] in (b"", b"\n")
        for i in range(KEY_BYTES if good else 0):
            pair = digits[2 * i : 2 * i + 2]
            good = good and pair.isalnum()
            try:
                secret[i] = int(pair, 16) if good else 0
            except ValueError:
                good = False
        if not good:
            raise ConfigError(problem + f"does not hold {2 * KEY_BYTES} hexadecimal digits; openssl rand -hex 32")
        return Secret(secret)
    finally:
        digits[:] = bytes(len(digits))
        os.close(descriptor)


class Label(NamedTuple):
    """What a subkey is for: a segment of the session (0 when there is one), a layer, a global KV head."""

    layer: int
    head: int
    segment: int = 0


Labels = Sequence[Label] | np.ndarray  # as an array (R, 3) uint32: layer, head, segment


def rows_of(labels: Labels) -> np.ndarray:
    """Labels as an array."""
    return np.ascontiguousarray(labels, dtype=np.uint32).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class Scope:
    """What all subkeys of an engine have in common: model (an identity of it, any bytes) and scheme."""

    model: bytes
    scheme: str


class SessionKeys:
    """One session's key and what is derived from it. Clear it at the session's end.

    namespace: 32 hexadecimal digits that name the key without telling it, for whoever shares cached tokens: two
    sessions may share only under one namespace.
    """

    def __init__(self, root: Secret, nonce: bytes, scope: Scope, *, tenant: bytes = b"", epoch: int = 0) -> None:
        self._scope, self._epoch = scope, epoch
        self._secret = Secret(bytearray(KEY_BYTES))
        material = bytearray(struct.pack(">I", len(tenant)) + tenant) + root.data
        info = _joined(VERSION, b"session", struct.pack(">I", epoch))
        HKDF(SHA256(), KEY_BYTES, nonce, info).derive_into(material, self._secret.data)
        material[:] = bytes(len(material))
        name = bytearray(16)
        HKDFExpand(SHA256(), len(name), self._info("namespace", Label(0, SHARED_HEAD))).derive_into(
            self._secret.data, name
        )
        self.namespace = name.hex()

    def __repr__(self) -> str:
        return "<SessionKeys>"

    def clear(self) -> None:
        """Forget the key."""
        self._secret.clear()

    def _info(self, purpose: str, label: Label) -> bytes:
        place = struct.pack(">4I", self._epoch, label.segment, label.layer, label.head)
        return _joined(VERSION, self._scope.model, self._scope.scheme.encode(), place, purpose.encode())

    def _text(self, purpose: str) -> key_draws.Text:
        """_info() of any label, and where in it the label stands: behind three parts, a length and the epoch."""
        info = self._info(purpose, Label(0, 0))
        return key_draws.Text(info, len(info) - len(purpose.encode()) - 4 - 12)

    def words(self, purpose: str, labels: Labels, count: int) -> np.ndarray:
        """(len(labels), count) uint32: the first words of each label's stream."""
        drawn: np.ndarray = np.empty((len(labels), count), dtype="<u4")
        if key_draws.available():
            key_draws.words(self._secret.data, self._text(purpose), rows_of(labels), drawn)
        else:
            for row, label in zip(drawn, rows_of(labels).tolist(), strict=True):
                self.stream(purpose, Label(*label)).fill(row)
        return drawn

    def signs(self, purpose: str, labels: Labels, into: np.ndarray) -> None:
        """1 or -1 by the first bit of each word, into (2, len(labels), D) int16."""
        if key_draws.available():
            key_draws.signs(self._secret.data, self._text(purpose), rows_of(labels), into)
            return
        dim = into.shape[2]
        words = self.words(purpose, labels, 2 * dim)
        words >>= np.uint32(31)
        into[:] = 1 - 2 * words.view(np.int32).reshape(-1, 2, dim).transpose(1, 0, 2)
        words.fill(0)

    def shuffles(self, purpose: str, labels: Labels, orders: np.ndarray, inverses: np.ndarray | None = None) -> None:
        """permutations() into (len(labels), size) int16, and what undoes them."""
        if key_draws.available():
            key_draws.shuffles(self._secret.data, self._text(purpose), rows_of(labels), orders, inverses)
            return
        orders[:] = permutations_slowly(self, purpose, [Label(*label) for label in rows_of(labels).tolist()],
                                        orders.shape[1])  # fmt: skip
        if inverses is not None:
            inverses[:] = np.argsort(orders, axis=1)

    def stream(self, purpose: str, label: Label) -> Stream:
        """The random words of one purpose: "qk", "v" or "row"."""
        subkey = bytearray(KEY_BYTES)
        HKDFExpand(SHA256(), KEY_BYTES, self._info(purpose, label)).derive_into(self._secret.data, subkey)
        made = Stream(subkey)
        subkey[:] = bytes(KEY_BYTES)
        return made


class Stream:
    """ChaCha20's key stream as little-endian 32-bit words; the nonce is 0, since every subkey has one stream."""

    def __init__(self, subkey: bytearray) -> None:
        self._encryptor = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next (count,) uint32."""
        drawn: np.ndarray = np.empty(count, dtype="<u4")
        self.fill(drawn)
        return drawn

    def fill(self, words: np.ndarray) -> None:
        """The next words into a contiguous array of uint32."""
        self._encryptor.update_into(bytes(words.nbytes), words.view(np.uint8).data)


def _joined(*parts: bytes) -> bytes:
    """Parts with their lengths, so that no two lists give the same bytes."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


# ---------------------------------------------------------------- what is drawn from streams


def permutations(keys: SessionKeys, purpose: str, labels: Labels, size: int) -> np.ndarray:
    """(len(labels), size) int16: an unbiased shuffle of 0..size-1 for each label. size: 2..2**15."""
    orders: np.ndarray = np.empty((len(labels), size), dtype=np.int16)
    keys.shuffles(purpose, labels, orders)
    return orders


def permutations_slowly(keys: SessionKeys, purpose: str, labels: Sequence[Label], size: int) -> np.ndarray:
    """The same by `cryptography` and numpy: where there is no C++, and what C++ is compared with."""
    words: np.ndarray = np.empty((len(labels), size - 1), dtype="<u4")
    for row, label in zip(words, labels, strict=True):
        keys.stream(purpose, label).fill(row)
    shuffled = shuffle(words, size)
    for row in np.flatnonzero(shuffled[:, 0] < 0).tolist():  # a word was thrown away: about one row in 2**32 / size**2
        shuffled[row] = shuffle_slowly(keys.stream(purpose, labels[row]), size)
    words.fill(0)
    return shuffled


def _accepted(count: int) -> int:
    """Words below this are as likely to be any value modulo `count`."""
    return WORDS - WORDS % count


def shuffle(words: np.ndarray, size: int) -> np.ndarray:
    """Shuffles of 0..size-1 from (R, size - 1) words, all rows at once; a row with a biased word is all -1."""
    rows = np.arange(words.shape[0])
    order = np.tile(np.arange(size, dtype=np.int16), (words.shape[0], 1))
    counts: np.ndarray = np.arange(size, 1, -1, dtype=np.intp)
    chosen: np.ndarray = words.astype(np.intp)
    chosen %= counts  # in place: a copy of it would stay behind
    for step, last in enumerate(range(size - 1, 0, -1)):
        other = chosen[:, step]
        kept = order[rows, other]
        order[rows, other] = order[:, last]
        order[:, last] = kept
    limits = np.array([_accepted(int(count)) for count in counts], dtype=np.uint64)
    order[(words >= limits).any(axis=1)] = -1
    chosen.fill(0)
    return order


def shuffle_slowly(stream: Stream, size: int) -> np.ndarray:
    """The same for one row, word by word, drawing again where a word would favour some values."""
    order: np.ndarray = np.arange(size, dtype=np.int16)
    for last in range(size - 1, 0, -1):
        word = WORDS
        while word >= _accepted(last + 1):
            word = int(stream.words(1)[0])
        other = word % (last + 1)
        order[[last, other]] = order[[other, last]]
    return order


def uniforms(words: np.ndarray) -> np.ndarray:
    """(R, 2 * n) uint32 words as (R, n) float64 in the open interval (0, 1), 53 bits each."""
    pairs: np.ndarray = words.astype(np.uint64).reshape(words.shape[0], -1, 2)
    return (((pairs[..., 0] << np.uint64(21)) | (pairs[..., 1] >> np.uint64(11))) + 0.5) / float(1 << 53)
