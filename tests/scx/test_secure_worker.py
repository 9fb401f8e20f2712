"""A secure worker answers as the local side does, bit for bit; whatever else an engine sends, it refuses by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import ConfigError
from engine.scx import frames
from engine.scx.audit import verify
from engine.scx.errors import LayerNotEncoded, OutOfOrder, ShapeMismatch, UnknownSession
from engine.scx.remote import RemoteSecureSide
from engine.scx.secure_worker import Worker, listen
from scripts.scx_exactness import GROUPS, HEADS
from tests.scx.workers import (
    DIM,
    SLOTS,
    TOKENS,
    WIDTH,
    batch_of,
    config_of,
    geometry,
    remote,
    rows_of,
    side_of,
    start_process,
    worker_thread,
)

STEPS = [((0, 0, 20), (2, 0, 7)), ((0, 20, 1), (2, 7, 9), (1, 0, 3)), ((0, 21, 1), (2, 16, 1), (1, 3, 30))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Worker]]:
    """A worker that every test of this module leaves in order."""
    with worker_thread(tmp_path_factory.mktemp("worker")) as found:
        yield found


class Engine:
    """An engine that says what it likes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(5)
        self.socket.connect(path)
        self.region: frames.Region | None = None

    def raw(self, data: bytes) -> Any:
        """Send bytes; the answer, or None at the end of the connection."""
        self.socket.send(data)
        raw, descriptors, _, _ = socket.recv_fds(self.socket, frames.MAX_FRAME_BYTES, 1)
        if descriptors:
            self.region = frames.Region(descriptors[0], geometry())
        return frames.decode_from_worker(raw) if raw else None

    def say(self, *messages: msgspec.Struct) -> Any:
        """Send messages that are answered; the last answer."""
        for message in messages:
            found = self.raw(frames.encode(message))
        return found

    def hello(self, version: int = frames.VERSION, what: Any = None) -> Any:
        """The first frame of the handshake."""
        return self.say(frames.Hello(version, msgspec.Raw(frames.encode(geometry() if what is None else what))))

    def ready(self) -> Engine:
        """The whole handshake, and a session on slot 0."""
        assert isinstance(self.hello(), frames.Welcome) and self.region is not None
        self.region.inbox((TOKENS, 2, DIM // 2), torch.float32).zero_()
        assert isinstance(self.say(frames.Start()), frames.Ready)
        assert isinstance(self.say(frames.Open(0, b"n" * 16, b"", 0)), frames.Opened)
        return self

    def refused(self, answer: Any, kind: str, said: str) -> None:
        """The answer is that refusal, and tells nothing else."""
        assert isinstance(answer, frames.Refused) and answer.kind == kind and said in answer.message, answer

    def ended(self) -> bool:
        """Whether the worker hung up."""
        return self.socket.recv(1) == b""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.region = None
        self.socket.close()


def works(path: str) -> None:
    """A good engine is served."""
    side = remote(path)
    side.open(0, b"n" * 16)
    batch = batch_of((0, 0, 2))
    side.encode(0, rows_of(batch), batch)
    side.decode(0, torch.ones(2, HEADS * DIM), batch)
    side.shut()


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["perm", "perm-static", "rotate", "mix"])
@pytest.mark.parametrize("extra", [{}, {"seal_tokens": 8}, {"seal_tokens": 8, "segment_tokens": 16}])
def test_it_answers_as_the_local_side(tmp_path: Path, dtype: torch.dtype, scheme: str, extra: dict[str, int]) -> None:
    """Encoded rows, sealed blocks and decoded rows of hybrid steps are equal to the last bit; projections for matrices
    come in float32, and what comes back is in the engine's type."""
    if scheme == "perm-static" and "segment_tokens" in extra:
        pytest.skip("the configuration refuses it")
    with worker_thread(tmp_path, same_nonces=True) as (path, _):
        ours, theirs = (side_of(config_of(where, scheme=scheme, **extra), dtype) for where in ("cpu", path))
        assert isinstance(theirs, RemoteSecureSide)
        for slot in (0, 1, 2):
            assert ours.open(slot, bytes([slot]) * 16) == theirs.open(slot, bytes([slot]) * 16)
        for number, chunks in enumerate(STEPS):
            batch = batch_of(*chunks)
            for layer in (0, 2):
                projected = torch.float32 if scheme in ("rotate", "mix") else dtype
                given = rows_of(batch, number, dtype=projected)
                wanted, found = ours.encode(layer, given, batch), theirs.encode(layer, given, batch)
                assert all(map(torch.equal, wanted, found))
                assert {part.dtype for part in (*wanted, *found)} == {dtype}
                if "seal_tokens" in extra:
                    blocks, same = ours.seal(layer, batch), theirs.seal(layer, batch)
                    assert (blocks is None) == (same is None)
                    assert blocks is None or all(map(torch.equal, blocks, same or ()))
                width = HEADS * (DIM + 1) if "segment_tokens" in extra else HEADS * DIM
                kind = torch.float32 if "segment_tokens" in extra else dtype
                out = torch.randn(wanted.q.shape[0], width, generator=torch.Generator().manual_seed(9)).to(kind)
                assert torch.equal(ours.decode(layer, out, batch), theirs.decode(layer, out, batch))
        assert "segment_tokens" in extra or ours.traffic == theirs.traffic  # with segments, keys cross once here
        theirs.shut()


def test_no_engine_gets_a_key_twice(tmp_path: Path) -> None:
    """The worker adds to the engine's nonce: the same nonce again, the same root, another key."""
    with worker_thread(tmp_path) as (path, _):
        side = remote(path)
        names = {side.open(slot, b"n" * 16) for slot in range(3)}
        side.close(0)
        names.add(side.open(0, b"n" * 16))
        assert len(names) == 4
        side.shut()


def test_a_connection_owns_its_sessions(tmp_path: Path) -> None:
    """When it ends, tables and keys are cleared, and the next engine finds every slot free."""
    with worker_thread(tmp_path, audit=str(tmp_path / "audit")) as (path, worker):
        side = remote(path)
        side.open(1, b"n" * 16)
        assert worker._served is not None
        local = worker._served._side
        assert local is not None and any(table.any() for maps in local._tables for table in maps)
        session = local._sessions[1]
        side.shut()
        works(path)
        assert not any(table.any() for maps in local._tables for table in maps)
        with pytest.raises(Exception, match="cleared"):
            _ = session.keys._secret.data
        side = remote(path)
        side.open(1, b"n" * 16)
        side.shut()
    events = verify(str(tmp_path / "audit"))
    assert [event.event for event in events][:4] == ["connect", "disconnect"] * 2
    assert events[3].facts == {"opened": 1, "closed": 0, "encoded_rows": 2, "decoded_rows": 2}


# ---------------------------------------------------------------- the local side's rules, over the wire


def test_rows_are_answered_once_and_in_order(place: tuple[str, Worker]) -> None:
    """A replay, a gap, another layer, a free slot, a second decode: refused by the type that the local side raises,
    and the connection goes on."""
    side = remote(place[0])
    side.open(1, b"n" * 16)
    batch = batch_of((1, 0, 4))
    side.encode(0, rows_of(batch), batch)
    out = torch.ones(4, HEADS * DIM)
    side.decode(0, out, batch)
    with pytest.raises(OutOfOrder, match="layer 0: rows to decode"):
        side.decode(0, out, batch)
    for chunk in ((1, 0, 4), (1, 5, 1), (1, 3, 1)):
        with pytest.raises(OutOfOrder, match="but 4 is next"):
            side.encode(0, rows_of(batch_of(chunk)), batch_of(chunk))
    with pytest.raises(LayerNotEncoded, match="layer 1 is not one of 0, 2"):
        side.encode(1, rows_of(batch), batch)
    with pytest.raises(UnknownSession, match="slot 3"):
        side.encode(0, rows_of(batch_of((3, 0, 1))), batch_of((3, 0, 1)))
    with pytest.raises(UnknownSession, match="has an open session"):
        side.open(1, b"n" * 16)
    later = batch_of((1, 4, 2))
    for wrong in (rows_of(batch), rows_of(later)[:, 1:], rows_of(later).double()):
        with pytest.raises(ShapeMismatch):
            side.encode(0, wrong, later)
    side.encode(0, rows_of(later), later)
    with pytest.raises(OutOfOrder, match="layer 2"):
        side.decode(2, out, later)
    with pytest.raises(ShapeMismatch):
        side.decode(0, torch.ones(3, HEADS * DIM), later)
    side.decode(0, torch.ones(2, HEADS * DIM), later)
    side.shut()
    works(place[0])


# ---------------------------------------------------------------- engines that mean harm


def test_numbers_of_a_hostile_engine_are_checked(place: tuple[str, Worker]) -> None:
    """Past this project's own client: chunks, slots, layers and steps outside what was agreed."""
    with Engine(place[0]) as engine:
        engine.ready()
        say, refused, chunk = engine.say, engine.refused, frames.Chunk
        refused(say(frames.Open(SLOTS, b"n" * 16, b"", 0)), "UnknownSession", "slot 4 is outside 0..3")
        for chunks in ([chunk(SLOTS, 0, 1)], [chunk(0, 0, TOKENS + 1)], [chunk(0, 3, 3)], [chunk(0, 4, 3)]):
            refused(say(frames.Encode(1, 0, chunks)), "ShapeMismatch", "outside")
        refused(say(frames.Encode(1, 0, [chunk(0, 0, TOKENS)] * 5)), "ShapeMismatch", "320 rows in a step")
        refused(say(frames.Encode(1, 0, [chunk(0, 0, 1)] * 2)), "OutOfOrder", "two chunks of one slot")
        refused(say(frames.Encode(1, 0, [chunk(0, 0, 1)])), "OutOfOrder", "step 1 after step 1")
        refused(say(frames.Encode(2, 7, [chunk(0, 0, 1)])), "LayerNotEncoded", "layer 7")
        refused(say(frames.Encode(3, 0, [chunk(1, 0, 1)])), "UnknownSession", "slot 1 has no open session")
        refused(say(frames.Decode(3, 0)), "OutOfOrder", "layer 0")
        assert isinstance(say(frames.Encode(4, 0, [chunk(0, 0, 5)])), frames.Encoded)
        refused(say(frames.Encode(4, 0, None)), "OutOfOrder", "but 5 is next")
        refused(say(frames.Encode(9, 0, None)), "OutOfOrder", "step 9 is not going on")
        refused(say(frames.Decode(3, 0)), "OutOfOrder", "step 3 is not going on")
        assert isinstance(say(frames.Decode(4, 0)), frames.Decoded)
        refused(say(frames.Decode(4, 0)), "OutOfOrder", "layer 0")
    works(place[0])


@pytest.mark.parametrize("data", [
    b"\xc1", b"garbage" * 40, b"\x00" * frames.MAX_FRAME_BYTES, frames.encode({"type": "open"}),
    frames.encode(["open", -1, b"n" * 16, b"", 0]), frames.encode(["open", 0, b"n" * 15, b"", 0]),
    frames.encode(["open", 0, b"n" * 16, b"x" * 300, 0]), frames.encode(["open", 0, b"n" * 16, b"", 0, 1]),
    frames.encode(["e", 0, 0, None]), frames.encode(["e", 1, 0, []]), frames.encode(["e", 1, 0, [[0, 0, 1 << 40]]]),
    frames.encode(["e", 1, 0, [[0, 0, 1]] * 9000]), frames.encode(["d", 1, -1]), frames.encode(["E", 1, 1]),
])  # fmt: skip
def test_a_frame_outside_the_schema_ends_the_connection(place: tuple[str, Worker], data: bytes) -> None:
    """Said and hung up, before and after the handshake; the worker serves the next engine."""
    for prepare in (False, True):
        with Engine(place[0]) as engine:
            if prepare:
                engine.ready()
            engine.refused(engine.raw(data), "WorkerRefused", "outside the schema")
            assert engine.ended()
    works(place[0])


def test_a_frame_that_is_too_long_is_not_read(place: tuple[str, Worker]) -> None:
    """One byte above the limit."""
    with Engine(place[0]) as engine:
        engine.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        engine.refused(engine.raw(b"\x00" * (frames.MAX_FRAME_BYTES + 1)), "WorkerRefused", "above")
        assert engine.ended()
    works(place[0])


def test_handshakes_that_are_refused(place: tuple[str, Worker], tmp_path: Path) -> None:
    """Another version, a geometry that means nothing or costs too much, twice, none at all."""
    fields = msgspec.to_builtins(geometry(), builtin_types=(bytes,))
    wrong = [
        (fields | {"scheme": "none"}, "no such scheme"), (fields | {"layers": [2, 1]}, "geometry"),
        (fields | {"layers": []}, "geometry"), (fields | {"slots": 1 << 20}, "geometry"),
        (fields | {"heads": 3}, "geometry"), (fields | {"head_dim": 15}, "geometry"),
        (fields | {"step_tokens": 1 << 32}, "geometry"), (fields | {"model": b"x"}, "geometry"),
        (fields | {"dtype": "float8"}, "geometry"), (fields | {"more": 1}, "geometry"),
        (fields | {"projected": "float16"}, "geometry"),
        (fields | {"head_dim": 4096, "step_tokens": (1 << 31) - 1}, "geometry"),
        (fields | {"head_dim": 4096, "slots": 8192, "scheme": "mix"}, "--limit-bytes"), ([], "geometry"),
        (fields | {"head_dim": 1024, "max_tokens": 4096, "step_tokens": 1, "segment_tokens": 1, "scheme": "mix"},
         "maps of segments of a request"),
    ]  # fmt: skip
    for what, said in wrong:
        with Engine(place[0]) as engine:
            engine.refused(engine.hello(what=what), "WorkerRefused", said)
            assert engine.ended()
    with Engine(place[0]) as engine:
        engine.refused(engine.hello(version=1), "WorkerRefused", "protocol version 1; this worker speaks 2")
    for early in (frames.Start(), frames.Open(0, b"n" * 16, b"", 0), frames.Encode(1, 0, None), frames.Decode(1, 0)):
        with Engine(place[0]) as engine:
            assert engine.say(early).kind == "WorkerRefused" and engine.ended()
    for again in (frames.Hello(frames.VERSION, msgspec.Raw(frames.encode(geometry()))), frames.Start()):
        with Engine(place[0]) as engine:
            assert engine.ready().say(again).kind == "WorkerRefused" and engine.ended()
    works(place[0])
    with worker_thread(tmp_path, limit_bytes=1000) as (path, _), pytest.raises(ConfigError, match="--limit-bytes"):
        remote(path)


def test_a_second_engine_and_another_user_are_refused(
    place: tuple[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first keeps its sessions; who may connect is the kernel's word, not the client's."""
    path, worker = place
    side = remote(path)
    side.open(0, b"n" * 16)
    with pytest.raises(ConfigError, match="another engine is connected"):
        remote(path)
    batch = batch_of((0, 0, 1))
    side.encode(0, rows_of(batch), batch)
    side.shut()
    works(path)
    monkeypatch.setattr(worker, "_uids", {os.geteuid() + 1})
    with pytest.raises(ConfigError, match=f"user {os.geteuid()} may not connect; .*--allow-uid {os.geteuid()}"):
        remote(path)


@settings(max_examples=150)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255), st.integers(0, 5))
def test_damaged_frames_never_end_the_worker(
    place: tuple[str, Worker], noise: bytes, at: int, byte: int, which: int
) -> None:
    """Random bytes, and valid frames with a byte changed: answered or hung up on, never more."""
    good = [frames.encode(message) for message in (
        frames.Hello(frames.VERSION, msgspec.Raw(frames.encode(geometry()))), frames.Open(1, b"n" * 16, b"t", 3),
        frames.Encode(1, 0, [frames.Chunk(0, 0, 9)]), frames.Decode(1, 2), frames.Start())]  # fmt: skip
    data = bytearray(noise or b"\0") if which == 5 else bytearray(good[which])
    data[at % len(data)] = byte
    with Engine(place[0]) as engine:
        if which:
            engine.ready()
        engine.socket.send(data)
        if frames.encode(frames.Close(0))[1:7] != bytes(data[1:7]):  # the one frame without an answer
            engine.socket.recv(frames.MAX_FRAME_BYTES)
    assert place[1]._listener.fileno() >= 0


def test_a_worker_still_stands_after_all_that(place: tuple[str, Worker]) -> None:
    """And its thread has not died of any of the above."""
    works(place[0])


def test_the_region_cannot_be_resized(place: tuple[str, Worker]) -> None:
    """An engine that shrinks it would fault the worker; the kernel refuses, and so does whoever maps one unsealed."""
    descriptor = frames.make_region(geometry())
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, frames.areas(geometry()).total_bytes)
    with pytest.raises(ValueError, match="can be resized"):
        frames.Region(loose, geometry())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("seal", "segment"), [(0, 0), (8, 0), (8, 16), (0, 5)])
def test_areas_hold_the_largest_step(dtype: str, seal: int, segment: int) -> None:
    """Whatever a step of the agreed size brings fits its area, exactly where nothing is shared between uses."""
    made = msgspec.structs.replace(geometry(), dtype=dtype, seal_tokens=seal, segment_tokens=segment)
    region = frames.Region(frames.make_region(made), made)
    rows = made.step_tokens
    queries = rows * -(-TOKENS // segment) if segment else rows
    region.inbox((rows, WIDTH))
    region.inbox((TOKENS, 2, DIM // 2), torch.float32)
    region.inbox((queries, HEADS * (DIM + 1)), torch.float32) if segment else region.inbox((rows, HEADS * DIM))
    region.outbox((queries * HEADS * DIM + 2 * rows * GROUPS * DIM,))
    if seal:
        places, order = region.seals(rows // seal + made.slots)
        assert order.shape == (rows // seal + made.slots, GROUPS, seal) and places.is_contiguous()
    with pytest.raises(ValueError, match="in an area of"):
        region.outbox((2 * queries * (HEADS + 2 * GROUPS) * DIM + 4096,))


def test_places_of_workers_are_checked(tmp_path: Path) -> None:
    """A path in use, one too long, nobody there: named, with what to do."""
    with worker_thread(tmp_path) as (path, _), pytest.raises(ConfigError, match="answers there already"):
        listen(path, others=False)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        listen(str(tmp_path / ("x" * 120)), others=False)
    stale = tmp_path / "stale"
    first = listen(str(stale), others=False)
    first.close()  # as a killed worker leaves it
    second = listen(str(stale), others=False)
    assert stale.stat().st_mode & 0o777 == 0o600
    second.close()


def test_sigterm_ends_a_worker_in_order(tmp_path: Path) -> None:
    """Status 0, the socket removed, the audit closed with its end."""
    path, audit = tmp_path / "socket", tmp_path / "audit"
    process = start_process(str(path), more=("--audit-file", str(audit)))
    process.terminate()
    assert process.wait(10) == 0 and not path.exists()
    assert [event.event for event in verify(str(audit))][-1] == "end"


def test_a_changed_audit_shows(tmp_path: Path) -> None:
    """A line changed or taken out breaks the chain, and a worker does not continue such a file."""
    path = tmp_path / "audit"
    with worker_thread(tmp_path, audit=str(path)) as (where, _):
        works(where)
    lines = path.read_text().splitlines()
    assert len(lines) == len(verify(str(path))) >= 2 and path.stat().st_mode & 0o777 == 0o600
    for broken in (lines[1:], [lines[0].replace("connect", "nothing"), *lines[1:]], [lines[0], "x"]):
        path.write_text("\n".join(broken) + "\n")
        with pytest.raises(ConfigError, match="line"):
            verify(str(path))
