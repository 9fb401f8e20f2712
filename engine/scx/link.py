"""How an engine reaches a secure worker: a connection that notices death and silence, and a child that it starts.

It knows frames and patience, not what rows mean (engine/scx/remote.py).
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from typing import TypeVar

import msgspec
import torch

from engine.core.clock import Clock
from engine.scx import frames
from engine.scx.errors import ScxError, WorkerLost, WorkerRefused

STALL_S = 5.0  # without a beat
STUCK_S = 120.0  # with beats, but without an answer
WAKE_S = 0.5
END_S = 3.0
REFUSALS = {kind.__name__: kind for kind in ScxError.__subclasses__()}
Answer = TypeVar("Answer", bound=msgspec.Struct)


class Link:
    """One connection to a worker. Raises WorkerLost where the worker does, or says nothing in time."""

    def __init__(self, path: str, clock: Clock, first_answer_s: float) -> None:
        self._clock = clock
        self._first_answer_s = first_answer_s
        self.region: frames.Region | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wake = struct.pack("ll", int(WAKE_S), int(WAKE_S % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, wake)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise WorkerLost(f"no secure worker answers at {path} ({error.strerror or error})") from None

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._socket.close()
        self.region = None

    def greet(self, geometry: frames.Geometry, rope: torch.Tensor) -> None:
        """The handshake. Raises WorkerRefused with what the worker objects to."""
        hello = frames.Hello(frames.VERSION, msgspec.Raw(frames.encode(geometry)))
        self.call(hello, frames.Welcome, geometry)
        if self.region is None:
            raise WorkerLost("the secure worker sent no shared memory")
        self.region.inbox(tuple(rope.shape), torch.float32).copy_(rope)
        self.call(frames.Start(), frames.Ready)

    def send(self, message: msgspec.Struct) -> None:
        """One frame, without an answer."""
        try:
            self._socket.send(frames.encode(message))
        except OSError as error:
            raise WorkerLost(f"the secure worker is gone ({error.strerror or error})") from None

    def call(self, message: msgspec.Struct, kind: type[Answer], geometry: frames.Geometry | None = None) -> Answer:
        """One frame and its answer, of this kind. geometry: of the region that comes with it. Raises the ScxError
        that the worker answers."""
        self.send(message)
        answer = self._receive(geometry)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, frames.Refused):
            raise REFUSALS.get(answer.kind, WorkerRefused)(answer.message)
        raise WorkerLost("the secure worker answered something else")

    def _receive(self, geometry: frames.Geometry | None) -> frames.FromWorker:
        begin_s = beat_s = self._clock.now_s()
        beats = None if self.region is None else self.region.beats()
        while True:
            try:
                if geometry is None:
                    raw = self._socket.recv(frames.MAX_FRAME_BYTES)
                else:
                    raw, descriptors, _, _ = socket.recv_fds(self._socket, frames.MAX_FRAME_BYTES, 1)
                    if descriptors:
                        self.region = frames.Region(descriptors[0], geometry)
                if not raw:
                    raise WorkerLost("the secure worker closed the connection")
                return frames.decode_from_worker(raw)
            except BlockingIOError:  # nothing within WAKE_S
                now_s = self._clock.now_s()
                seen = None if self.region is None else self.region.beats()
                if seen != beats:
                    beats, beat_s = seen, now_s
                patience_s = self._first_answer_s if self.region is None else STALL_S
                if now_s - beat_s > patience_s or now_s - begin_s > STUCK_S:
                    raise WorkerLost(f"the secure worker was silent for {now_s - begin_s:.0f} s") from None
            except (OSError, ValueError, msgspec.DecodeError) as error:
                raise WorkerLost(f"the secure worker is gone ({type(error).__name__})") from None


class OwnWorker:
    """A worker that this engine starts beside itself and that ends with it. path: of its socket, in a folder that
    only this user may enter. A dead one is started again by start()."""

    def __init__(self, key_file: str | None) -> None:
        self._folder = tempfile.mkdtemp(prefix="tessera-scx-")  # mode 0700
        self.path = f"{self._folder}/worker"
        self._key_file = key_file
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self.status is None

    @property
    def status(self) -> int | None:
        """What it ended with; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it unless it runs. Does not wait until it listens."""
        if self.alive:
            return
        self._reap()
        command = [sys.executable, "-m", "engine.scx.secure_worker", "--socket", self.path, "--lifeline"]
        if self._key_file is not None:
            command += ["--key-file", self._key_file]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, close_fds=True)

    def _reap(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        """End it. Idempotent."""
        self._reap()
        shutil.rmtree(self._folder, ignore_errors=True)
