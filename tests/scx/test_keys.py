"""Keys are a function of their names alone, what is drawn from them is unbiased, and nothing shows or keeps them."""

from __future__ import annotations

import logging
import os
import random
from itertools import permutations as all_orders
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import ConfigError, InvariantError
from engine.scx.keys import (
    Label,
    Scope,
    Secret,
    SessionKeys,
    Stream,
    permutations,
    permutations_slowly,
    read_root,
    shuffle,
    shuffle_slowly,
)
from engine.scx.matrices import CONDITION
from engine.scx.schemes import Maps, maps_of, schemes
from tessera_kernels import head_matrices, key_draws, native

LAYERS, HEADS = (0, 5), 3


def session(root: int = 1, nonce: bytes = b"n" * 16, scheme: str = "perm", **names: object) -> SessionKeys:
    """A session's keys from a root of equal bytes."""
    return SessionKeys(Secret(bytearray([root]) * 32), nonce, Scope(b"model", scheme), **names)  # type: ignore[arg-type]


def maps(keys: SessionKeys, scheme: str, dim: int = 16) -> Maps:
    """The maps of a scheme."""
    return maps_of(schemes[scheme](), keys, LAYERS, HEADS, dim)


def test_the_derivation_is_fixed() -> None:
    """Known answers: a change of labels, order or encoding would lock everybody out of what they stored."""
    keys = session()
    assert keys.namespace == "c71fdacde53102e11caac310d3c6fa09"
    assert keys.stream("qk", Label(3, 1)).words(2).tolist() == [1137254114, 4165662581]
    assert permutations(keys, "v", [Label(0, 0)], 8)[0].tolist() == [3, 5, 4, 7, 0, 1, 6, 2]


def test_every_name_matters() -> None:
    """Root, nonce, tenant, epoch, model, scheme, purpose, layer, head and segment each give other words."""
    label = Label(1, 2, 3)
    streams = [
        session().stream("qk", label), session(root=2).stream("qk", label),
        session(nonce=b"m" * 16).stream("qk", label), session(tenant=b"t").stream("qk", label),
        session(epoch=1).stream("qk", label), session(scheme="mix").stream("qk", label),
        SessionKeys(Secret(bytearray([1]) * 32), b"n" * 16, Scope(b"other", "perm")).stream("qk", label),
        session().stream("v", label), session().stream("row", label),
        *(session().stream("qk", other) for other in (Label(2, 2, 3), Label(1, 1, 3), Label(1, 2, 4), Label(2, 1, 3))),
    ]  # fmt: skip
    assert len({tuple(stream.words(4).tolist()) for stream in streams}) == len(streams)
    again = session().stream("qk", label)
    assert np.array_equal(again.words(4), session().stream("qk", label).words(4))
    assert len({session(n).namespace for n in range(5)}) == 5


@settings(max_examples=50)
@given(st.integers(2, 40), st.lists(st.integers(0, (1 << 32) - 1), min_size=80, max_size=80))
def test_shuffling_many_rows_equals_shuffling_one(size: int, words: list[int]) -> None:
    """The fast form and the plain one agree; where a word is biased the fast one says so and the plain one draws on."""

    class Listed:
        """A stream of the words given."""

        def __init__(self) -> None:
            self.left = words + list(range(200))

        def words(self, count: int) -> np.ndarray:
            """The next ones."""
            taken, self.left = self.left[:count], self.left[count:]
            return np.array(taken, dtype=np.uint32)

    fast = shuffle(np.array([words[: size - 1]], dtype=np.uint32), size)[0]
    slow = shuffle_slowly(Listed(), size)  # type: ignore[arg-type]
    assert sorted(slow.tolist()) == list(range(size))
    biased = any(word >= (1 << 32) - (1 << 32) % (size - i) for i, word in enumerate(words[: size - 1]))
    assert (fast[0] == -1) == biased
    assert biased or fast.tolist() == slow.tolist()


@pytest.mark.parametrize("size", [2, 3, 17, 64, 128, 1 << 15])
def test_many_labels_at_once_equal_one_by_one(size: int) -> None:
    """C++ draws what `cryptography` and numpy draw, to the last bit, for more labels than a vector has lanes, for
    names of any length, and where words are thrown away: of the longest rows every seventeenth or so has one."""
    keys = session(tenant=b"t", epoch=7, scheme="perm")
    labels = [Label(layer, head, 5) for layer in range(9) for head in (0, 3, 1 << 31, (1 << 32) - 1)]
    orders, inverses = (np.empty((len(labels), size), dtype=np.int16) for _ in range(2))
    for purpose in ("qk", "a longer purpose than a block of SHA-256 has room for beside the other names"):
        keys.shuffles(purpose, labels, orders, inverses)
        assert np.array_equal(orders, permutations_slowly(keys, purpose, labels, size))
        assert (np.take_along_axis(orders, inverses.astype(np.int64), axis=1) == np.arange(size)).all()
        want = np.stack([keys.stream(purpose, label).words(37) for label in labels])
        assert np.array_equal(keys.words(purpose, labels, 37), want)
        signs = np.zeros((2, len(labels), 19), dtype=np.int16)
        keys.signs(purpose, labels, signs)
        first = np.stack([keys.stream(purpose, label).words(38) >> 31 for label in labels]).astype(np.int16)
        assert np.array_equal(signs, 1 - 2 * first.reshape(-1, 2, 19).transpose(1, 0, 2))
    if size == 1 << 15:
        last = np.arange(size, 1, -1, dtype=np.uint64)
        words = np.stack([keys.stream(purpose, label).words(size - 1) for label in labels])
        assert (words >= (1 << 32) - (1 << 32) % last).any()  # else nothing was thrown away


@pytest.mark.parametrize("scheme", ["perm", "perm-static", "rotate", "mix"])
def test_maps_do_not_need_the_extension(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without C++ the same maps come out."""
    want = maps(session(scheme=scheme), scheme)
    monkeypatch.setattr(key_draws, "available", lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(maps(session(scheme=scheme), scheme), want, strict=True))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("scheme", ["perm", "perm-static", "rotate", "mix"])
def test_no_frameworks_generator_takes_part(scheme: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds change nothing, no generator of Python, numpy or torch is a step further afterwards, and none is made."""
    if not fast:
        monkeypatch.setattr(key_draws, "available", lambda: False)
        monkeypatch.setattr(head_matrices, "fits", lambda drawn, into: False)
    for place, name in ((np.random, "default_rng"), (np.random, "Generator"), (torch, "Generator"), (random, "Random")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("a generator was made"))
    found = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        found.append([maps(session(scheme=scheme), scheme, dim) for dim in (16, 24)])
        assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("dim", [16, 64, 256])
@pytest.mark.parametrize("scheme", ["rotate", "mix"])
def test_matrices_do_not_need_the_extension(scheme: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch builds the same rotations to the last bit, and scaled ones within rounding."""
    made = maps(session(scheme=scheme), scheme, dim)
    monkeypatch.setattr(head_matrices, "fits", lambda drawn, into: False)
    for built, want in zip(made, maps(session(scheme=scheme), scheme, dim), strict=True):
        assert torch.equal(built, want) if scheme == "rotate" else (built - want).abs().max() < 1e-6


@pytest.mark.skipif(not native.available(torch.float32), reason="the C++ kernels are not built")
def test_building_refuses_what_is_no_order() -> None:
    """An entry outside of the head, a type or a shape that does not belong to it."""
    drawn, into = torch.zeros(8, 2, 16, dtype=torch.int16), torch.zeros(3, 2, 16, 16)
    head_matrices.build(drawn, into)
    for row in (0, 1, 4, 5):
        wrong = drawn.clone()
        wrong[row, 1, 3] = 16
        with pytest.raises(IndexError, match="outside 0..15"):
            head_matrices.build(wrong, into)
    for rows, place in ((drawn.int(), into), (drawn, into[:2]), (drawn[:7], into), (drawn, into.double())):
        with pytest.raises(ValueError, match="want"):
            head_matrices.build(rows, place)


def test_a_biased_word_is_drawn_again() -> None:
    """2**32 - 1 would favour small values modulo 3: it must not count, and the next word must."""
    assert shuffle(np.array([[0xFFFFFFFF, 0]], dtype=np.uint32), 3)[0, 0] == -1
    assert shuffle(np.array([[0xFFFFFFFE, 0]], dtype=np.uint32), 3)[0, 0] != -1


def test_permutations_are_uniform() -> None:
    """Chi-square over the 24 orders of 4: 23 degrees of freedom, 99.9 % below 49.7. The words are fixed."""
    labels = [Label(layer, head) for layer in range(50) for head in range(96)]
    drawn = permutations(session(), "qk", labels, 4)
    counts = [int((drawn == np.array(order)).all(axis=1).sum()) for order in all_orders(range(4))]
    expected = len(labels) / 24
    assert sum(counts) == len(labels)
    assert sum((count - expected) ** 2 / expected for count in counts) < 49.7


@pytest.mark.parametrize("scheme", ["perm", "perm-static"])
@pytest.mark.parametrize("dim", [16, 96])
def test_permutations_undo_each_other(scheme: str, dim: int) -> None:
    """Queries and keys share an order, the output's is the inverse of the values'."""
    made = maps(session(), scheme, dim)
    assert all(table.shape == (2, HEADS, dim) and table.dtype is torch.int16 for table in made)
    assert torch.equal(made.q, made.k)
    assert torch.equal(made.v.gather(-1, made.out.long()), torch.arange(dim).expand_as(made.v).short())


@pytest.mark.parametrize("scheme", ["rotate", "mix"])
@pytest.mark.parametrize("dim", [16, 64, 24])  # powers of two are Hadamard rounds, others Householder's
def test_matrices_undo_each_other(scheme: str, dim: int) -> None:
    """M M^-1 = 1 for values and output, M^T Q = 1 for keys and queries; condition as promised; float32."""
    made = maps(session(), scheme, dim)
    assert all(table.shape == (2, HEADS, dim, dim) and table.dtype is torch.float32 for table in made)
    identity = torch.eye(dim, dtype=torch.float64)
    assert (made.v.double() @ made.out.double() - identity).abs().max() < 1e-6
    assert (made.k.double() @ made.q.double().mT - identity).abs().max() < 1e-6
    conditions = torch.linalg.cond(torch.cat([made.k, made.v]).double())
    assert conditions.max() <= (1 if scheme == "rotate" else CONDITION) + 1e-4
    assert scheme == "rotate" or conditions.min() > 2


def test_haar_and_hadamard_rotations_are_spread_out() -> None:
    """An entry's mean is 0 and its variance 1/D, whatever the row and column."""
    for dim in (16, 12):
        made = maps_of(schemes["rotate"](), session(), range(40), 10, dim).k.flatten(0, 1).double()
        assert made.mean(0).abs().max() < 5 / (dim * 400) ** 0.5
        assert (made.pow(2).mean(0) * dim - 1).abs().max() < 0.5


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_maps_differ_between_requests_layers_heads_and_purposes(scheme: str) -> None:
    """Nothing is shared; only perm-static shares, and it says so."""
    first, second = maps(session(), scheme), maps(session(nonce=b"o" * 16), scheme)
    tables = [table[layer, head] for made in (first, second) for table in (made.k, made.v)
              for layer in range(2) for head in range(HEADS)]  # fmt: skip
    assert len({table.numpy().tobytes() for table in tables}) == len(tables)
    static = maps(session(scheme="perm-static"), "perm-static")
    assert torch.equal(static.k, static.v) and torch.equal(static.k[0, 0], static.k[0, 1])
    assert not torch.equal(static.k[0, 0], static.k[1, 0])


def test_a_session_forgets() -> None:
    """After clear() the key's bytes are gone and nothing can be derived any more."""
    keys = session()
    data = keys._secret.data
    assert len(data) == 32 and any(data)
    keys.clear()
    assert not data
    with pytest.raises(InvariantError, match="cleared"):
        keys.stream("qk", Label(0, 0))


def test_nothing_shows_a_key(caplog: pytest.LogCaptureFixture) -> None:
    """Text forms, logs and copies of what holds keys."""
    caplog.set_level(logging.DEBUG)
    root = Secret(bytearray(b"\xab" * 32))
    keys = SessionKeys(root, b"n" * 16, Scope(b"model", "perm"))
    logging.getLogger("engine").debug("%s %r %s", root, keys, [root])
    shown = caplog.text + str(root) + repr(keys) + str({"a": keys})
    assert "ab" * 4 not in shown and "xab" not in shown and keys._secret.data.hex() not in shown
    with pytest.raises(TypeError):
        root.__reduce__()


def test_a_root_file_is_strict(tmp_path: Path) -> None:
    """Owner only, 64 hexadecimal digits, a file; the error never quotes it."""
    path = tmp_path / "root"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert read_root(str(path)).data == bytearray(b"\xab" * 32)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640.*chmod 600"):
        read_root(str(path))
    path.chmod(0o600)
    for text in ("ab" * 31, "ab" * 33, "zz" * 32, "ab" * 32 + "x", " " + "ab" * 32, "+a" * 32, ""):
        path.write_text(text)
        with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
            read_root(str(path))
        assert "abab" not in str(caught.value)
    os.mkfifo(tmp_path / "fifo", 0o600)  # nobody writes to it: to wait would be for ever
    for absent in (tmp_path / "none", tmp_path, tmp_path / "fifo"):
        with pytest.raises(ConfigError, match="--scx-key-file"):
            read_root(str(absent))


def test_words_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words that permutations were drawn from are zeros afterwards, and no copy of all of them was made."""
    filled: list[np.ndarray] = []
    fill = Stream.fill

    def watched(self: Stream, words: np.ndarray) -> None:
        fill(self, words)
        assert words.any()
        filled.append(words)

    keys = session()
    monkeypatch.setattr(Stream, "fill", watched)
    permutations_slowly(keys, "qk", [Label(0, 0), Label(0, 1)], 16)
    assert len(filled) == 2 and not any(words.any() for words in filled)
