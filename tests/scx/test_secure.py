"""The secure side answers for scheduled rows once, in order, with open sessions, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.errors import InvariantError
from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.request import SamplingParams
from engine.parts.rope import rope_table
from engine.runner.batch import Batch, Row, pack
from engine.scx import on_peer
from engine.scx.config import ScxConfig
from engine.scx.errors import LayerNotEncoded, OutOfOrder, ScxError, ShapeMismatch, UnknownSession
from engine.scx.keys import Secret, SessionKeys
from engine.scx.open import OF_SCHEME, THREATS, open_scx, side_of
from engine.scx.schemes import map_bytes, schemes
from engine.scx.secure import HeadShape, LocalSecureSide, indexed
from engine.scx.segments import SegmentedSide
from engine.scx.sessions import Sessions
from scripts.scx_exactness import GROUPS, HEADS, spec_of

DIM, TOKENS = 16, 64
WIDTH = (HEADS + 2 * GROUPS) * DIM
SCHEMES = ("perm", "perm-static", "rotate", "mix")


def side(**config: object) -> LocalSecureSide:
    """Layers 0 and 2 encoded, four slots."""
    asked = ScxConfig((0, 2), **config)  # type: ignore[arg-type]
    rope = rope_table(spec_of(DIM).rope, DIM, TOKENS, TOKENS)
    made = open_scx(asked, spec_of(DIM), rope, slots=4, max_tokens=TOKENS, compute=torch.device("cpu"),
                    root=Secret(bytearray(range(32)))).secure  # fmt: skip
    assert isinstance(made, LocalSecureSide)
    return made


def batch_of(*chunks: tuple[int, int, int]) -> Batch:
    """(slot, start, count) of each chunk."""
    return pack([Row(slot, start, [0] * count, True) for slot, start, count in chunks])


def rows(batch: Batch, seed: int = 0) -> torch.Tensor:
    """Random projections of a batch."""
    return torch.randn(batch.num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def turn(secure: LocalSecureSide, layer: int, batch: Batch) -> torch.Tensor:
    """One encode and its decode."""
    secure.encode(layer, rows(batch), batch)
    return secure.decode(layer, torch.ones(batch.num_tokens, HEADS * DIM), batch)


def refused(kind: type[ScxError], said: str, call: Callable[[], object]) -> None:
    """The call raises that error."""
    with pytest.raises(kind, match=said):
        call()


@pytest.mark.parametrize("extra", [{}, {"segment_tokens": 8}])
def test_rows_are_answered_once_and_in_order(extra: dict[str, int]) -> None:
    """A position twice, one skipped, one before: each is refused by name, in every layer on its own."""
    secure = side(**extra)
    refused(UnknownSession, "slot 1 has no open session", lambda: turn_encode(secure, 0, batch_of((1, 0, 4))))
    secure.open(1, b"n" * 16)
    refused(UnknownSession, "slot 1 has an open session", lambda: secure.open(1, b"m" * 16))
    refused(LayerNotEncoded, "layer 1 is not one of 0, 2", lambda: turn_encode(secure, 1, batch_of((1, 0, 4))))
    refused(OutOfOrder, "from position 3, but 0 is next", lambda: turn_encode(secure, 0, batch_of((1, 3, 1))))
    turn_encode(secure, 0, batch_of((1, 0, 4)))
    for again in ((1, 0, 4), (1, 3, 1), (1, 5, 1), (1, 0, 5)):
        refused(OutOfOrder, "but 4 is next", lambda again=again: turn_encode(secure, 0, batch_of(again)))
    turn_encode(secure, 2, batch_of((1, 0, 4)))  # the other layer counts for itself
    turn_encode(secure, 0, batch_of((1, 4, 1)))
    refused(OutOfOrder, "two chunks of one slot", lambda: turn_encode(secure, 0, batch_of((1, 5, 1), (1, 5, 1))))
    secure.close(1)
    refused(UnknownSession, "no open session", lambda: turn_encode(secure, 0, batch_of((1, 5, 1))))
    secure.open(1, b"o" * 16)
    turn_encode(secure, 0, batch_of((1, 0, 7)))


def turn_encode(secure: LocalSecureSide, layer: int, batch: Batch) -> None:
    """Encode alone."""
    secure.encode(layer, rows(batch), batch)


def test_a_batch_with_one_wrong_row_encodes_none() -> None:
    """The other sequence of a refused step is not counted as encoded."""
    secure = side()
    secure.open(0, b"a" * 16)
    secure.open(1, b"b" * 16)
    refused(OutOfOrder, "slot 1", lambda: turn_encode(secure, 0, batch_of((0, 0, 3), (1, 2, 1))))
    turn_encode(secure, 0, batch_of((0, 0, 3), (1, 0, 1)))


def test_output_is_decoded_for_the_rows_just_encoded_once() -> None:
    """No decode without its encode, none twice, none for another batch, none of another size."""
    secure = side()
    secure.open(0, b"a" * 16)
    batch = batch_of((0, 0, 3))
    out = torch.ones(3, HEADS * DIM)
    refused(OutOfOrder, "layer 0", lambda: secure.decode(0, out, batch))
    secure.encode(0, rows(batch), batch)
    refused(OutOfOrder, "layer 2", lambda: secure.decode(2, out, batch))
    refused(OutOfOrder, "layer 0", lambda: secure.decode(0, out, batch_of((0, 0, 3))))
    refused(ShapeMismatch, "scheduled rows", lambda: secure.decode(0, torch.ones(4, HEADS * DIM), batch))
    secure.decode(0, out, batch)
    refused(OutOfOrder, "layer 0", lambda: secure.decode(0, out, batch))
    later = batch_of((0, 3, 1))
    refused(ShapeMismatch, "scheduled rows", lambda: secure.encode(0, rows(batch), later))
    refused(LayerNotEncoded, "layer 7", lambda: secure.decode(7, out, batch))


def test_invented_positions_are_not_looked_at() -> None:
    """Rotation follows the chunks that were checked, whatever the tensors beside them say."""
    honest, other = side(), side()
    for secure in (honest, other):
        secure.open(0, b"a" * 16)
    batch, lying = batch_of((0, 0, 4)), batch_of((0, 0, 4))
    lying.positions, lying.token_slots = torch.zeros(4, dtype=torch.int32), torch.full((4,), 3, dtype=torch.int32)
    first, second = honest.encode(0, rows(batch), batch), other.encode(0, rows(batch), lying)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_closing_clears_the_tables(scheme: str) -> None:
    """A closed session's maps are zeros, the others' are whole, and shutting clears the root."""
    secure = side(scheme=scheme)
    secure.open(0, b"a" * 16)
    secure.open(3, b"b" * 16)
    assert all(table[slot].any() for maps in secure._tables for table in maps for slot in (0, 3))
    session = secure._sessions[0]
    secure.close(0)
    secure.close(0)  # idempotent
    assert not any(table[0].any() for maps in secure._tables for table in maps)
    assert all(table[3].any() for maps in secure._tables for table in maps)
    with pytest.raises(Exception, match="cleared"):
        _ = session.keys._secret.data
    secure.shut()
    assert not any(table.any() for maps in secure._tables for table in maps)
    with pytest.raises(Exception, match="cleared"):
        secure.open(0, b"c" * 16)


@pytest.mark.parametrize("failing", ["shuffles", "make"])
def test_an_open_that_fails_leaves_nothing(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error behind what is drawn, or behind the maps: no key, no half-filled table, and the slot is free."""
    secure, held, drawn = side(), [], []
    draw, make, shuffles = type(secure.scheme).draw, type(secure.scheme).make, SessionKeys.shuffles

    def watched_draw(self: Any, keys: SessionKeys, layers: Any, segment: int, into: torch.Tensor) -> None:
        held.append(keys)
        drawn.append(into)
        draw(self, keys, layers, segment, into)

    def failing_shuffles(self: SessionKeys, *more: Any) -> None:
        shuffles(self, *more)
        raise MemoryError("planted")

    def failing_make(self: Any, *more: Any) -> None:
        make(self, *more)
        assert drawn[0].any() and secure._whole.any()
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(type(secure.scheme), "draw", watched_draw)
        patch.setattr(*((SessionKeys, "shuffles", failing_shuffles) if failing == "shuffles" else
                        (type(secure.scheme), "make", failing_make)))  # fmt: skip
        with pytest.raises(MemoryError, match="planted"):
            secure.open(2, b"a" * 16)
    assert not drawn[0].any() and not secure._whole.any()
    with pytest.raises(InvariantError, match="cleared"):
        _ = held[0]._secret.data
    refused(UnknownSession, "slot 2 has no open session", lambda: turn_encode(secure, 0, batch_of((2, 0, 4))))
    secure.open(2, b"b" * 16)
    turn_encode(secure, 0, batch_of((2, 0, 4)))


def test_no_text_form_shows_maps() -> None:
    """Sessions with segments, their maps, sealed blocks' orders: none shows a number."""
    secure = side(segment_tokens=4, seal_tokens=2)
    secure.open(0, b"a" * 16)
    batch = batch_of((0, 0, 9))
    secure.encode(0, rows(batch), batch)
    session = secure._sessions[0]
    for thing in (session, secure._sessions, session.segments, secure.seal(0, batch), side()._tables):
        assert "tensor" not in repr(thing) and "[[" not in repr(thing), type(thing)


def test_copies_of_segments_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's selection of maps is a copy: it is zeros after encode and after decode, and the session's are whole."""
    secure, copies = side(segment_tokens=4), []
    maps_of = SegmentedSide._maps_of
    monkeypatch.setattr(SegmentedSide, "_maps_of", lambda *more: copies.append(maps_of(*more)) or copies[-1])
    secure.open(0, b"a" * 16)
    batch = batch_of((0, 0, 9))
    secure.encode(0, rows(batch), batch)
    secure.decode(0, torch.ones(9 + 5 + 1, HEADS * (DIM + 1)), batch)  # queries that see each segment
    assert len(copies) == 2 and not any(table.any() for maps in copies for table in maps)
    assert all(table.any() for maps in secure._sessions[0].segments for table in maps)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_maps_take_what_the_formula_says(scheme: str) -> None:
    """map_bytes() counts the tables of a slot, and what a segment adds; queries and keys share one where alike."""
    secure, segmented = side(scheme=scheme), side(scheme="mix", segment_tokens=4)
    distinct = {table.data_ptr(): table.nbytes for maps in secure._tables for table in maps}
    assert sum(distinct.values()) == 4 * map_bytes(scheme, 2, GROUPS, DIM)
    assert len(distinct) == 2 * (4 if scheme == "mix" else 3)
    segmented.open(0, b"a" * 16)
    turn_encode(segmented, 0, batch_of((0, 0, 12)))
    kept = [table.nbytes for maps in segmented._sessions[0].segments for table in maps]
    assert sum(kept) == 3 * map_bytes("mix", 2, GROUPS, DIM)


def test_closing_clears_segments() -> None:
    """Maps of segments, too."""
    secure = side(segment_tokens=4)
    secure.open(0, b"a" * 16)
    turn_encode(secure, 0, batch_of((0, 0, 9)))
    held = [table for maps in secure._sessions[0].segments for table in maps]
    assert len(secure._sessions[0].segments) == 3 and all(table.any() for table in held)
    secure.close(0)
    assert not any(table.any() for table in held)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_depends_on_its_own_session_only(scheme: str) -> None:
    """Together or alone, in any slot: the same bits (permutations), the same numbers (matrices)."""
    together, alone = side(scheme=scheme), side(scheme=scheme)
    together.open(0, b"a" * 16)
    together.open(1, b"b" * 16)
    alone.open(2, b"b" * 16)
    both, one = batch_of((0, 0, 5), (1, 0, 3)), batch_of((2, 0, 3))
    given = rows(both)
    crowd = together.encode(0, given, both)
    single = alone.encode(0, given[5:], one)
    for a, b in zip(crowd, single, strict=True):
        torch.testing.assert_close(a[5:], b, rtol=0, atol=0 if scheme.startswith("perm") else 1e-5)


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_the_same_prompt_twice_is_not_the_same_rows(scheme: str) -> None:
    """Two requests, two nonces: no row of one is a row of the other (perm-static is the opposite, on purpose)."""
    secure, static = side(scheme=scheme), side(scheme="perm-static")
    batch = batch_of((0, 0, 6), (1, 0, 6))
    given = rows(batch)
    given[6:] = given[:6]
    for one in (secure, static):
        one.open(0, b"a" * 16)
        one.open(1, b"b" * 16)
    for mine, shared in zip(secure.encode(0, given, batch), static.encode(0, given, batch), strict=True):
        assert not (mine[:6] == mine[6:]).all(dim=-1).any()
        assert torch.equal(shared[:6], shared[6:])


@pytest.mark.parametrize(("scheme", "said"), [
    ("perm", "permutation mode is reversible from a single snapshot"),
    ("perm-static", "one map for all requests and heads: for comparison only"),
    ("perm-static", "permutation mode is reversible from a single snapshot"),
    ("rotate", "rotation mode is reversible from norms"), ("mix", "lengths under mix still name some tokens"),
])  # fmt: skip
def test_the_log_says_what_a_scheme_does_not_hide(scheme: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """At start, as warnings: the limits of every scheme, then those of this one; debugging lines only when asked."""
    side(scheme=scheme)
    whole, where, own = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert whole == f"{THREATS} Selected layers: 0,2; docs/scx.md says more."
    assert "no isolation" in where and said in own and "public weights" in own
    assert "SCX DEBUG" not in caplog.text and set(OF_SCHEME) == set(schemes.names())


def test_debugging_shows_without_a_logging_configuration(caplog: pytest.LogCaptureFixture) -> None:
    """As SCX-vLLM prints it: layers and device, above the level that Python shows by itself."""
    side(debug=True)
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.lastResort.level]
    assert {"[SCX DEBUG] SCX_ENC_LAYERS: 0,2", "[SCX DEBUG] SCX_SECURE_DEVICE: cpu"} < set(shown)


def test_the_document_has_the_statement_that_is_logged(root: Path) -> None:
    """The very words, whatever the line breaks."""
    quoted = [line.removeprefix("> ") for line in (root / "docs/scx.md").read_text("utf-8").splitlines()
              if line.startswith("> ")]  # fmt: skip
    assert THREATS in " ".join(quoted)
    for claim in ("obfuscation, not encryption", "a single snapshot", "from norms", "about head_dim tokens",
                  "queries, hidden states, scores or logits", "not selected are plaintext", "no integrity",
                  "a malicious compute node", "lengths, timing, batch composition or sampled tokens", "AES-GCM"):
        assert claim in THREATS


def test_sessions_follow_plans() -> None:
    """Opened at admission, closed at release, preemption and refusal; a new epoch has another key."""
    secure = side()
    scx = open_scx(ScxConfig((0,)), spec_of(DIM), rope_table(spec_of(DIM).rope, DIM, TOKENS, TOKENS), slots=4,
                   max_tokens=TOKENS, compute=torch.device("cpu"))  # fmt: skip
    scx.secure = secure
    sessions = Sessions(scx)

    def admit(seq_id: int, epoch: int = 0) -> Admission:
        return Admission(seq_id, epoch, (1, 2), 0, SamplingParams())

    sessions.follow(StepPlan(0, (Chunk(7, 0, 0, 2, True),), (admit(7), admit(8), admit(9))), {9}, lambda seq: seq - 7)
    assert sorted(secure._sessions) == [0, 1]
    first = sessions.namespaces[7]
    sessions.follow(StepPlan(1, (), (admit(10),), (7,)), set(), lambda seq: 0)  # the slot passes on within a step
    assert sorted(secure._sessions) == [0, 1] and sorted(sessions.namespaces) == [8, 10]
    sessions.follow(StepPlan(2, (Chunk(8, 0, 2, 1, True),)), {8}, lambda seq: 1)  # its growth was refused
    assert sorted(secure._sessions) == [0]
    sessions.follow(StepPlan(3, (), (admit(7, 1),), (8, 10)), set(), lambda seq: 2)
    assert sorted(secure._sessions) == [2] and sessions.namespaces[7] != first
    sessions.shut()
    assert not secure._sessions


def test_a_device_has_one_name() -> None:
    """cuda and cuda:0 are one: taken for two, rows would cross between them and lose the kernel that stores them."""
    assert indexed(torch.device("cuda")) == torch.device("cuda:0") == indexed(torch.device("cuda:0"))
    assert indexed(torch.device("cpu")) == torch.device("cpu") and indexed(torch.device("cuda:1")).index == 1
    rope = torch.zeros(TOKENS, 2, DIM // 2)
    made = LocalSecureSide(ScxConfig((0,)), HeadShape(HEADS, GROUPS, DIM, 1, TOKENS), rope, Secret(bytearray(32)), b"",
                           torch.device("cuda"))  # fmt: skip
    assert made.compute == torch.device("cuda:0")


def test_which_side_answers_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By where keys live, and whether one GPU's kernels reach the other."""
    compute, found = torch.device("cuda:0"), []
    for secure, reached in (("cuda", True), ("cuda:1", True), ("cuda:1", False), ("cpu", False)):
        monkeypatch.setattr(on_peer, "reachable", lambda *_, reached=reached: reached)
        found.append(side_of(ScxConfig((0,), secure), compute, torch.bfloat16).__name__)
    assert found == ["DeviceSecureSide", "PeerSecureSide", "LocalSecureSide", "HostSecureSide"]
    assert side_of(ScxConfig((0,), "cpu"), compute, torch.float64) is LocalSecureSide
