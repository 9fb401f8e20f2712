"""Starts real server processes for tests, looks into /proc, speaks raw HTTP where a client library is too polite."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.models import write_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FAKE = "tests.serve.fake_server"
REAL = "engine.api_server"
START_S = 60.0
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
}  # fmt: skip


def tiny_folder(folder: Path, template: str | None = None) -> Path:
    """A model folder without weights: what the fake engine's server needs. template: another chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """Living descendants of a process (zombies are not living)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if entry.name.isdigit() and state != "Z":
                parents[int(entry.name)] = int(parent)
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found[1:]


def command_of(pid: int) -> str:
    """The command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_until(condition: Any, seconds: float = 10.0) -> bool:
    """Poll a condition until it is true or time is up; says which."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


@dataclass
class Server:
    """A server process of this test, ready."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    started_s: float
    clients: list[httpx.Client] = field(default_factory=list)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        """The engine process."""
        (found,) = [pid for pid in children(self.process.pid) if "engine" in command_of(pid).split("-m")[-1]
                    and "text_worker" not in command_of(pid)]  # fmt: skip
        return found

    def client(self, **kwargs: Any) -> httpx.Client:
        """An httpx client with a timeout that fails a test rather than hanging it; closed with the server at last."""
        self.clients.append(httpx.Client(base_url=self.base, timeout=30, trust_env=False, **kwargs))
        return self.clients[-1]

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        for line in httpx.get(f"{self.base}/metrics", timeout=30, trust_env=False).text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")


def launch(tmp: Path, *flags: str, module: str = FAKE, port: int | None = None, env: dict[str, str] | None = None
           ) -> Server:
    """Start a server and return at once."""
    port = free_port() if port is None else port
    log = tmp / f"server-{port}-{time.monotonic_ns()}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", str(port), *flags], cwd=ROOT, stdout=sink, stderr=sink,
            stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    return Server(process, port, log, time.monotonic())


def wait_ready(server: Server, seconds: float = START_S) -> float:
    """Seconds from start to /ready; fails with the server's own words."""
    def ready() -> bool:
        if server.process.poll() is not None:
            raise AssertionError(f"ended with {server.process.returncode}: {server.text()}")
        try:
            return httpx.get(f"{server.base}/ready", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    assert wait_until(ready, seconds), server.text()
    return time.monotonic() - server.started_s


def stop(server: Server) -> int:
    """SIGTERM, and SIGKILL if that is not heard. Returns the exit status."""
    for client in server.clients:
        client.close()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            server.process.kill()
    return server.process.wait()


@contextlib.contextmanager
def running(tmp: Path, *flags: str, module: str = FAKE, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A ready server, stopped at the end."""
    server = launch(tmp, *flags, module=module, env=env)
    try:
        wait_ready(server)
        yield server
    finally:
        stop(server)


def raw(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or time is up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(65536):
                got += part
        return got


class Collected(threading.Thread):
    """A streamed completion read in a thread: its frames, and the exception it ended with, if any."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.frames: list[str] = []
        self.status = 0
        self.error: Exception | None = None
        self._server, self._body = server, {**body, "stream": True}
        self.start()

    def run(self) -> None:
        try:
            with self._server.client() as client, client.stream("POST", "/v1/completions", json=self._body) as answer:
                self.status = answer.status_code
                self.frames += [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        except httpx.HTTPError as error:
            self.error = error
