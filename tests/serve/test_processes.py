"""Processes: draining, death of either side, stalls, ports, orphans, descriptors, disks, readers that never read.

Every fault is real: signals, /proc, sockets. The engine is the fake one, in a real engine process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fake_engine import DIE_ID, LENGTH, SLEEP_ID
from tests.serve.harness import (
    FAKE,
    ROOT,
    Collected,
    Server,
    children,
    command_of,
    free_port,
    launch,
    raw,
    running,
    stop,
    tiny_folder,
    wait_ready,
    wait_until,
)

C = "/v1/completions"
LONG = {"prompt": [40, 41, 42], "max_tokens": LENGTH - 3, "ignore_eos": True}  # about 2.5 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return tiny_folder(tmp_path_factory.mktemp("processes") / "model")


@pytest.fixture
def server(tmp_path: Path, folder: Path) -> Iterator[Server]:
    """A server of this test's own, which it may kill."""
    with running(tmp_path, "--model", str(folder), "--served-model-name", "tiny", "--text-workers", "1") as found:
        yield found


def streaming(server: Server, count: int = 1) -> list[Collected]:
    """Streams that have begun."""
    found = [Collected(server, LONG) for _ in range(count)]
    assert wait_until(lambda: server.gauge("tessera_requests_running") >= count, 5)
    return found


def test_sigterm_drains(server: Server) -> None:
    """/ready 503 at once, new requests 503 with Retry-After, /health still fine, running ones finish, status 0."""
    (stream,) = streaming(server)
    with server.client() as http:
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: http.get("/ready").status_code == 503, 1)
        refused = http.post(C, json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "draining" and http.get("/health").status_code == 200
    stream.join(15)
    assert stream.frames[-1] == "[DONE]" and json.loads(stream.frames[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0 and "Traceback" not in server.text()


def test_sigint_is_sigterm_and_a_second_signal_is_now(server: Server) -> None:
    """The streams end with an error event; nothing is left behind."""
    (stream,) = streaming(server)
    family = children(server.process.pid)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    begin_s = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 0 and time.monotonic() - begin_s < 3
    stream.join(5)
    assert "shutting down" in json.loads(stream.frames[-1])["error"]["message"]
    assert wait_until(lambda: not [pid for pid in family if command_of(pid)], 5)


def test_the_grace_period_ends(tmp_path: Path, folder: Path) -> None:
    """--grace 0.2: what still runs then is ended with an error, status 0."""
    with running(tmp_path, "--model", str(folder), "--grace", "0.2") as server:
        (stream,) = streaming(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        stream.join(5)
        assert "error" in json.loads(stream.frames[-1])


def test_hangup_and_broken_pipes_change_nothing(server: Server) -> None:
    """HUP and PIPE are not reasons to end."""
    for number in (signal.SIGHUP, signal.SIGPIPE):
        server.process.send_signal(number)
    os.kill(server.engine_pid, signal.SIGTERM)  # a supervisor that signals the whole group: the server decides
    time.sleep(0.2)
    assert server.client().post(C, json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_killing_the_engine_ends_streams_and_the_server(server: Server) -> None:
    """Error events within 2 s, plain answers 503, /health 503, then exit status 1; no orphan."""
    streams = streaming(server, 3)
    family = children(server.process.pid)
    begin_s = time.monotonic()
    os.kill(server.engine_pid, signal.SIGKILL)
    with server.client() as http:
        assert wait_until(lambda: http.get("/health").status_code == 503, 1)
        assert http.post(C, json={"prompt": "x"}).status_code == 503
    for stream in streams:
        stream.join(2)
        assert stream.error is None and "engine process ended" in json.loads(stream.frames[-1])["error"]["message"]
    assert time.monotonic() - begin_s < 2
    assert server.process.wait(10) == 1 and "killed by signal 9" in server.text()
    assert wait_until(lambda: not [pid for pid in family if command_of(pid)], 5)


def test_an_engine_that_dies_of_a_request_says_503_to_it(server: Server) -> None:
    """A plain answer does not hang when the process behind it is gone."""
    answer = server.client().post(C, json={"prompt": [DIE_ID], "max_tokens": 3})
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
    assert server.process.wait(10) == 1


def test_killing_the_server_leaves_no_orphan(server: Server) -> None:
    """Engine and text workers die with it, even in mid-step and mid-stream, and the port is free."""
    streaming(server)
    family = children(server.process.pid)
    assert len(family) >= 2
    server.process.kill()
    server.process.wait(5)
    assert wait_until(lambda: not [pid for pid in family if command_of(pid)], 5)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))


def test_a_stopped_engine_is_reported_and_comes_back(server: Server) -> None:
    """SIGSTOP for 6 s: /health says so after 5 s; afterwards the answers are right."""
    engine = server.engine_pid
    (stream,) = streaming(server)
    os.kill(engine, signal.SIGSTOP)
    try:
        with server.client() as http:
            assert wait_until(lambda: http.get("/health").json() == {"status": "stalled"}, 8)
            assert http.get("/health").status_code == 503
    finally:
        os.kill(engine, signal.SIGCONT)
    with server.client() as http:
        assert wait_until(lambda: http.get("/health").status_code == 200, 3)
        answer = http.post(C, json={"prompt": [40, 41], "max_tokens": 2}).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2
    stream.join(10)
    assert stream.frames[-1] == "[DONE]"


def test_a_port_in_use_is_said_before_anything_is_loaded(server: Server, folder: Path) -> None:
    """Within a second or so, naming the port; the first server is untouched."""
    begin_s = time.monotonic()
    done = subprocess.run([sys.executable, "-m", FAKE, "--model", str(folder), "--port", str(server.port)], cwd=ROOT,
                          capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and f"port {server.port}" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and time.monotonic() - begin_s < 8
    assert server.client().get("/health").status_code == 200


@pytest.mark.parametrize(("flags", "status", "words"), [
    (["--seed", "13"], 2, "refused by the fake engine"),
    (["--seed", "14"], 1, "cannot build"),
    (["--tokenizer", "/does/not/exist"], 2, "/does/not/exist"),
    (["--host", "203.0.113.7"], 2, "cannot listen on 203.0.113.7"),
])  # fmt: skip
def test_a_start_that_fails_is_one_line(folder: Path, flags: list[str], status: int, words: str) -> None:
    """Exit status 2 where the user can fix it, else 1; no traceback, no orphan."""
    done = subprocess.run([sys.executable, "-m", FAKE, "--model", str(folder), "--port", str(free_port()), *flags],
                          cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_signal_during_the_start_ends_it(tmp_path: Path, folder: Path) -> None:
    """Nobody waits for a model to load in order to stop."""
    server = launch(tmp_path, "--model", str(folder))
    assert wait_until(lambda: len(children(server.process.pid)) >= 1, 10)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.text()


def test_no_child_inherits_a_listening_socket_and_nobody_else_listens(server: Server) -> None:
    """Children close descriptors; the only TCP listener of the family is the server's, on loopback."""
    listening = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                listening[words[9]] = words[1]
    held: dict[int, list[str]] = {}
    for pid in [server.process.pid, *children(server.process.pid)]:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if name.startswith("socket:[") and name[8:-1] in listening:
                    held.setdefault(pid, []).append(listening[name[8:-1]])
    assert held == {server.process.pid: [f"0100007F:{server.port:04X}"]}


def test_the_socket_between_the_processes_has_no_name_once_connected(server: Server) -> None:
    """Its folder was private, and is gone: nobody else can connect, and kill -9 leaves nothing behind."""
    paths = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "tessera-" in line]
    inodes = {os.readlink(entry)[8:-1] for pid in [server.process.pid, server.engine_pid]
              for entry in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(entry).startswith("socket:[")}
    mine = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()
            if len(line.split()) > 7 and line.split()[6] in inodes and "tessera-" in line]  # fmt: skip
    assert paths is not None and mine and not [path for path in mine if Path(path).exists()]


def test_a_full_disk_under_the_log_changes_nothing(tmp_path: Path, folder: Path) -> None:
    """Standard output and error are /dev/full: it serves, and drains with status 0."""
    with open("/dev/full", "wb") as full:
        port = free_port()
        process = subprocess.Popen([sys.executable, "-m", FAKE, "--model", str(folder), "--port", str(port)], cwd=ROOT,
                                   stdout=full, stderr=full, stdin=subprocess.DEVNULL)
    server = Server(process, port, tmp_path / "none", time.monotonic())
    server.log.touch()
    try:
        wait_ready(server)
        assert server.client().post(C, json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert server.gauge("tessera_log_lines_dropped_total") > 0
    finally:
        assert stop(server) == 0


def test_readers_that_never_read_lose_their_request(tmp_path: Path, folder: Path) -> None:
    """A client that stalls is dropped after --stall-abort; the others do not notice."""
    with running(tmp_path, "--model", str(folder), "--stall-abort", "0.5", "--served-model-name", "tiny") as server:
        body = json.dumps({"prompt": ["\U0001f642" * 20] * 60, "max_tokens": 200, "n": 8, "stream": True}).encode()
        request = (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
                   + str(len(body)).encode() + b"\r\n\r\n" + body)  # fmt: skip
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(request)
            assert wait_until(lambda: server.gauge("tessera_requests_running") == 480, 5)
            answer = server.client().post(C, json={"prompt": "x", "max_tokens": 3})
            assert answer.status_code == 200
            assert wait_until(lambda: server.gauge("tessera_requests_running") == 0, 20)
            assert server.gauge('tessera_requests_total{outcome="abort"}') > 0


def test_few_descriptors_pause_accepting_and_recover(tmp_path: Path, folder: Path) -> None:
    """128 descriptors, 200 connections: the server lives, and serves again when they are gone."""
    port = free_port()
    log = tmp_path / "few.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(["/bin/sh", "-c", f'ulimit -n 128; exec "{sys.executable}" -m {FAKE} '
                                    f'--model "{folder}" --port {port}'], cwd=ROOT, stdout=sink, stderr=sink)
    server = Server(process, port, log, time.monotonic())
    try:
        wait_ready(server)
        idle = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        for connection in idle:
            connection.close()
        assert wait_until(lambda: raw(port, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 2)
                          .startswith(b"HTTP/1.1 200"), 10)  # fmt: skip
        assert server.client().post(C, json={"prompt": "x", "max_tokens": 2}).status_code == 200
    finally:
        assert stop(server) == 0


def test_idle_connections_do_not_delay_health(server: Server) -> None:
    """500 silent connections, and /health answers at once."""
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(500)]
    try:
        with server.client() as http:
            http.get("/health")
            begin_s = time.monotonic()
            assert http.get("/health").status_code == 200
            assert time.monotonic() - begin_s < 1.0
    finally:
        for connection in idle:
            connection.close()


def test_too_many_samples_are_answered_503_at_once(tmp_path: Path, folder: Path) -> None:
    """--max-waiting bounds what is in the server; the refusal says so and when to come again."""
    with running(tmp_path, "--model", str(folder), "--max-waiting", "10") as server:
        stream = Collected(server, {**LONG, "n": 8})
        assert wait_until(lambda: server.gauge("tessera_requests_running") == 8, 5)
        refused = server.client().post(C, json={"prompt": "x", "n": 3})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert "retry-after" in refused.headers
        assert server.client().post(C, json={"prompt": "x", "n": 2, "max_tokens": 2}).status_code == 200
        stream.join(15)
        assert stream.frames[-1] == "[DONE]"
        assert server.client().post(C, json={"prompt": "x", "n": 10, "max_tokens": 2}).status_code == 200


def test_a_long_silence_is_no_reason_to_end_a_request(server: Server) -> None:
    """A sample that gets no token for a while stays; its client's leaving still ends it."""
    body = {"prompt": [SLEEP_ID, 41], "max_tokens": 5, "stream": True}
    with server.client() as http, http.stream("POST", C, json=body, timeout=3) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        time.sleep(1.0)
        assert server.gauge("tessera_requests_running") == 1
    assert wait_until(lambda: server.gauge("tessera_requests_running") == 0, 1.5)
