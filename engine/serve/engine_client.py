"""The server's side of the engine process: start it, talk to it, notice at once when it dies or stalls.

It knows no HTTP and no text. Death is seen by pidfd and by the end of the control pipe, a stall by a heartbeat that is
silent for STALL_S, or a step older than STUCK_STEP_S.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec
import zmq

from engine.core.clock import Clock, MonotonicClock
from engine.core.config import EngineConfig
from engine.serve import wire
from engine.serve.mailbox import Mailbox

log = logging.getLogger(__name__)

STALL_S = 5.0
STUCK_STEP_S = 120.0
EXIT_WAIT_S = 3.0
MESSAGES_A_TURN = 64
ENGINE_COMMAND = (sys.executable, "-m", "engine.serve.engine_process")


class EngineFailed(Exception):
    """The engine could not start, or has ended. exit_status: what the server should end with."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class EngineProcess:
    """The child: started before its configuration is known, so that it imports while the server resolves the model."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self.folder = tempfile.mkdtemp(prefix="tessera-")  # mode 0700
        self.address = f"ipc://{self.folder}/engine"
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True, bufsize=0)

    def configure(self, config: EngineConfig, log_level: str) -> None:
        """Send the one frame of its standard input, which stays open as the lifeline. Raises EngineFailed."""
        assert self.process.stdin is not None
        start = wire.EngineStart(config, self.address, os.getpid(), log_level)
        try:
            self.process.stdin.write(wire.frame(start))
        except BrokenPipeError:
            raise EngineFailed(f"the engine process ended with status {self.process.wait()} while it started") from None

    def forget_folder(self) -> None:
        """Remove the socket's folder: once connected, nobody else needs to find it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Kill and reap the process, whatever its state. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.forget_folder()


class _Frames(asyncio.Protocol):
    """Cuts the control pipe into messages."""

    def __init__(self, on_message: Callable[[wire.ControlMessage], None]) -> None:
        self._on_message = on_message
        self._rest = bytearray()

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while len(self._rest) >= 4:
            size = int.from_bytes(self._rest[:4], "little")
            if len(self._rest) < 4 + size:
                return
            body = bytes(self._rest[4 : 4 + size])
            del self._rest[: 4 + size]
            try:
                self._on_message(wire.decode_control(body))
            except msgspec.DecodeError as error:
                log.error("a control message outside the schema was dropped (%s)", type(error).__name__)


class EngineClient:
    """Add and abort samples, route their news to mailboxes. `state`: starting, ready, stalled or dead."""

    def __init__(self, child: EngineProcess, clock: Clock | None = None) -> None:
        self.child = child
        self.facts: wire.Facts | None = None
        self.stats: dict[str, float] = {}
        self.step_errors = 0
        self.on_stats: Callable[[dict[str, float]], None] = lambda values: None
        self.on_queued: Callable[[float], None] = lambda seconds: None
        self.on_progress: Callable[[str], None] = lambda text: None
        self.died: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()
        self._clock = clock or MonotonicClock()
        self._routes: dict[str, tuple[Mailbox, int]] = {}
        self._limit_answers: deque[asyncio.Future[wire.KvLimit]] = deque()
        self._ready: asyncio.Future[wire.Facts] = asyncio.get_running_loop().create_future()
        self._failed: EngineFailed | None = None
        self._beat_s = self._clock.now_s()
        self._step_age_s = 0.0
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._zmq_fd = -1
        self._pidfd = -1

    async def start(self) -> wire.Facts:
        """Wait until the engine is ready. Raises EngineFailed with its one line."""
        loop = asyncio.get_running_loop()
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._socket.bind(self.child.address)
        self._zmq_fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._zmq_fd, self._receive)
        self._pidfd = os.pidfd_open(self.child.process.pid)
        loop.add_reader(self._pidfd, self._on_exit)
        await loop.connect_read_pipe(lambda: _Frames(self._on_control), self.child.process.stdout)
        facts = await self._ready
        await asyncio.wait((self._connected, self.died), return_when=asyncio.FIRST_COMPLETED)
        if self.died.done():
            raise self.died.result()
        self.facts = facts
        self.child.forget_folder()
        return facts

    @property
    def state(self) -> str:
        """starting, ready, stalled or dead; what /health says."""
        if self.died.done():
            return "dead"
        if self.facts is None:
            return "starting"
        silent_s = self._clock.now_s() - self._beat_s
        return "stalled" if silent_s > STALL_S or self._step_age_s > STUCK_STEP_S else "ready"

    @property
    def live(self) -> int:
        """Samples whose end has not come."""
        return len(self._routes)

    def add(self, samples: Sequence[wire.Add], mailbox: Mailbox) -> None:
        """Send samples 0..len-1 of one HTTP request. Raises EngineFailed when the engine is not there."""
        if self.died.done():
            raise self.died.result()
        for index, sample in enumerate(samples):
            self._routes[sample.request_id] = (mailbox, index)
            self._send(sample)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these any more. Unknown ids are fine: they have just ended."""
        wanted = [name for name in request_ids if self._routes.pop(name, None) is not None]
        if wanted and not self.died.done():
            self._send(wire.Abort(wanted))

    async def set_kv_limit(self, groups: int) -> wire.KvLimit:
        """Ask the engine for another KV limit; answered between two steps. Raises EngineFailed when it is not there."""
        answer: asyncio.Future[wire.KvLimit] = asyncio.get_running_loop().create_future()
        if not self.died.done():
            self._limit_answers.append(answer)
            self._send(wire.SetKvLimit(groups))
            await asyncio.wait((answer, self.died), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise self.died.result()
        return answer.result()

    def fail_all(self, text: str, status: int) -> None:
        """End every sample with an error, here and in the engine."""
        routes, self._routes = self._routes, {}
        for mailbox, index in routes.values():
            mailbox.put(index, [], "error", text, status)
        if routes and not self.died.done():
            self._send(wire.Abort(list(routes)))

    async def close(self) -> None:
        """Ask the engine to end, wait a little, then insist. Idempotent."""
        if self.child.process.poll() is None and not self.died.done() and self.facts is not None:
            self._send(wire.Shutdown())
            try:
                await asyncio.wait_for(asyncio.shield(self.died), EXIT_WAIT_S)
            except TimeoutError:
                log.warning("the engine process did not end within %.0f s; it is killed", EXIT_WAIT_S)
        if self._zmq_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._zmq_fd)
            self._zmq_fd = -1
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._socket.close(0)
        self._context.term()
        self.child.close()

    def _send(self, message: msgspec.Struct) -> None:
        """Never blocks: the queue has no limit, and what is in it is bounded by the samples admitted."""
        self._socket.send(wire.encode(message), zmq.NOBLOCK)
        # The descriptor tells of changes only, and sending may have consumed one that was about something to read.
        asyncio.get_running_loop().call_soon(self._receive)

    def _receive(self) -> None:
        """Everything there is, some at a time, so that other clients get their turn."""
        for _ in range(MESSAGES_A_TURN):
            if self._socket.closed:
                return
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(wire.decode_from_engine(raw))
            except msgspec.DecodeError as error:  # whose news it was is unknown: nobody may wait for ever
                log.error("a message outside the schema came from the engine (%s)", type(error).__name__)
                self.fail_all("the engine sent what cannot be read; try again", 500)
        asyncio.get_running_loop().call_soon(self._receive)

    def _handle(self, message: wire.FromEngine) -> None:
        if not self._connected.done():
            self._connected.set_result(None)
        if isinstance(message, wire.Batch):
            for news in message.news:
                self._deliver(news)
            for seconds in message.queued_s:
                self.on_queued(seconds)
        elif isinstance(message, wire.Accepted):
            if message.request_id in self._routes:
                self._routes[message.request_id][0].accept()
        elif isinstance(message, wire.KvLimit):
            answer = self._limit_answers.popleft()
            if not answer.done():  # whoever asked may have left
                answer.set_result(message)
        else:
            self.stats = message.values
            self.on_stats(message.values)

    def _deliver(self, news: wire.News) -> None:
        route = self._routes.get(news.request_id)
        if route is None:
            return  # aborted meanwhile
        if news.finish_reason is not None:
            del self._routes[news.request_id]
        mailbox, index = route
        mailbox.put(index, news.tokens, news.finish_reason, news.error, news.status, news.param, news.logprobs)

    def _on_control(self, message: wire.ControlMessage) -> None:
        self._beat_s = self._clock.now_s()
        if isinstance(message, wire.Beat):
            self._step_age_s, self.step_errors = message.step_age_s, message.step_errors
        elif isinstance(message, wire.Progress):
            self.on_progress(message.text)
        elif isinstance(message, wire.Failed):
            self._failed = EngineFailed(message.text, message.exit_status)
        elif not self._ready.done():
            self._ready.set_result(message)

    def _on_exit(self) -> None:
        """The process has ended: its last words may still be in the pipe, so the verdict waits a moment."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        asyncio.get_running_loop().call_later(0.05, self._declare_dead)

    def _declare_dead(self) -> None:
        status = self.child.process.wait()
        how = f"killed by signal {-status}" if status < 0 else f"status {status}"
        failed = self._failed or EngineFailed(f"the engine process ended ({how})")
        if not self.died.done():
            self.died.set_result(failed)
        if not self._ready.done():
            self._ready.set_exception(failed)
        self.fail_all("the engine process ended; try again later", 503)
