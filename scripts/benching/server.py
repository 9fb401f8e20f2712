"""Starts the HTTP server for a benchmark, waits until it is ready, ends it. It knows no workload."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from engine.core.clock import MonotonicClock
from scripts.benching.drive import NotProduced
from scripts.benching.environment import ROOT

POLL_S = 0.02
END_S = 60.0
DEFAULT_START_S = 300.0


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(base: str) -> bool:
    """Whether a server answers /ready with 200."""
    try:
        with urllib.request.urlopen(f"{base}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Server:
    """`python -m engine.api_server` on a free port, ready. ready_s: from the command to the first 200 of /ready.

    flags: the server's. Raises NotProduced with its last words when it ends or takes longer than start_s.
    """

    def __init__(self, flags: Sequence[str], start_s: float = DEFAULT_START_S) -> None:
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "engine.api_server", "--port", str(port), *flags]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in (*sys.path, str(ROOT)) if path))
        self._log = tempfile.NamedTemporaryFile(prefix="tessera-bench-", suffix=".log")  # noqa: SIM115  close() does
        clock = MonotonicClock()
        begin_s = clock.now_s()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env=env)
        while not is_ready(self.base):
            if self._process.poll() is not None or clock.now_s() - begin_s > start_s:
                words = self._last_words()
                self.close()
                raise NotProduced(f"the server was not ready after {clock.now_s() - begin_s:.0f} s: {words}")
            time.sleep(POLL_S)
        self.ready_s = clock.now_s() - begin_s

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def close(self) -> None:
        """SIGTERM, then SIGKILL if that is not heard. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()
