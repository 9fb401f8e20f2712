"""The server's side of the text workers: one job each at a time, a deadline for each, a new process after an overrun.

It does not know what the text means. The event loop never encodes or renders anything itself, so that no prompt can
delay another client (reliability rules R6, R23).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from engine.core.errors import ConfigError
from engine.serve import wire
from engine.serve.errors import ApiError

log = logging.getLogger(__name__)

TEMPLATE_DEADLINE_S = 1.0
ENCODE_DEADLINE_S = 1.0
ENCODE_BYTES_PER_S = 250_000  # ten times slower than an ordinary text on a slow core
START_DEADLINE_S = 60.0
WAITING_FACTOR = 4  # more time, when the deadline passed while the worker was waiting for a processor
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
Answer = TypeVar("Answer", bound=msgspec.Struct)


class TextWorkerDied(Exception):
    """The worker ended before it answered."""


class _Worker:
    """One process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, message: msgspec.Struct | None) -> wire.FromText:
        """Send a job (or nothing, to read the greeting) and read one answer. Raises TextWorkerDied."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            if message is not None:
                stdin.write(wire.frame(message))
                await stdin.drain()
            size = int.from_bytes(await stdout.readexactly(4), "little")
            if size > wire.MAX_FRAME_BYTES:
                raise TextWorkerDied(f"a frame of {size} bytes")
            return wire.decode_from_text(await stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            raise TextWorkerDied(type(error).__name__) from error

    def cpu_s(self) -> float:
        """Processor seconds it has used so far; 0 when it is gone."""
        try:
            with open(f"/proc/{self.process.pid}/stat", encoding="ascii", errors="replace") as lines:
                words = lines.read().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(words[11]) + int(words[12])) / TICKS_PER_S

    async def kill(self) -> None:
        """End the process now and reap it."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class TextPool:
    """`await pool.encode(text, ...)`: ids, or ApiError 400 naming the limit that was passed."""

    def __init__(self, folder: str, size: int, command: Sequence[str] | None = None, patch: str | None = None) -> None:
        """folder: of the tokenizer; patch: of a patched vocabulary for it."""
        self._command = [*(command or (sys.executable, "-m", "engine.serve.text_worker")), folder]
        self._command += [patch] if patch is not None else []
        self._size = size
        self._idle: asyncio.Queue[_Worker | None] = asyncio.Queue()
        self._all: set[_Worker] = set()
        self._closed = False
        self._restarting: set[asyncio.Task[None]] = set()
        self.facts = wire.TextReady(1, False)
        self.restarts = 0
        self.on_restart: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Start every worker. Raises ConfigError with the worker's own words when it cannot load the tokenizer."""
        workers = await asyncio.gather(*(self._spawn() for _ in range(self._size)), return_exceptions=True)
        failed = [worker for worker in workers if isinstance(worker, BaseException)]
        if failed:
            raise failed[0]
        for worker in workers:
            assert isinstance(worker, _Worker)
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """Kill every worker. Idempotent."""
        self._closed = True
        await asyncio.gather(*(worker.kill() for worker in list(self._all)))
        self._all.clear()

    async def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int, both: bool = False) -> wire.Encoded:
        """The ids of a text; both: with the base vocabulary's. Raises ApiError 400 when it is longer than max_tokens
        [tokens]."""
        size = self._check_bytes(len(text.encode("utf-8", "surrogatepass")), max_tokens, "prompt")
        job = wire.Encode(text, add_special_tokens, max_tokens, both)
        done = await self._run(job, wire.Encoded, ENCODE_DEADLINE_S + size / ENCODE_BYTES_PER_S, "prompt")
        return _within(done, max_tokens, "prompt")

    async def render(self, messages: list[dict[str, str]], *, max_tokens: int, both: bool = False) -> wire.Encoded:
        """The ids of messages in the chat template. Raises ApiError 400 as encode does."""
        size = sum(len(text.encode("utf-8", "surrogatepass")) for item in messages for text in item.values())
        self._check_bytes(size, max_tokens, "messages")
        job = wire.Render(messages, max_tokens, self.longest_text_bytes(max_tokens), both)
        deadline_s = TEMPLATE_DEADLINE_S + size / ENCODE_BYTES_PER_S
        done = await self._run(job, wire.Encoded, deadline_s, "messages")
        return _within(done, max_tokens, "messages")

    async def convert(self, tokens: list[int]) -> wire.Encoded:
        """The engine's ids for base ids. Raises ApiError 400 for an id that the base has not."""
        deadline_s = ENCODE_DEADLINE_S + len(tokens) / ENCODE_BYTES_PER_S
        return await self._run(wire.Convert(tokens), wire.Encoded, deadline_s, "prompt")

    async def decode(self, tokens: list[int], *, base: bool = False) -> str:
        """The text of ids, special tokens included. base: they are the base vocabulary's."""
        deadline_s = ENCODE_DEADLINE_S + len(tokens) / ENCODE_BYTES_PER_S
        return (await self._run(wire.Decode(tokens, base), wire.Decoded, deadline_s, "tokens")).text

    def longest_text_bytes(self, max_tokens: int) -> int:
        """More bytes than this cannot be max_tokens tokens, whatever they say."""
        return max_tokens * self.facts.max_token_bytes

    def _check_bytes(self, size: int, max_tokens: int, param: str) -> int:
        limit = self.longest_text_bytes(max_tokens)
        if size > limit:
            raise ApiError(400, f"{param} has {size} bytes; no text of {max_tokens} tokens (the model's context) "
                                f"has more than {limit}", param, "context_length_exceeded")
        return size

    async def _run(self, job: msgspec.Struct, kind: type[Answer], deadline_s: float, param: str) -> Answer:
        """Give a job to the next free worker; kill the worker if it is late or the client has left."""
        worker = await self._idle.get() or await self._spawn_for_job()
        healthy: _Worker | None = None
        try:
            answer = await _ask_within(worker, job, deadline_s)
            healthy = worker
        except TimeoutError:
            raise ApiError(400, f"{param} took longer than {deadline_s:.1f} s to process; shorten it", param,
                           "text_too_slow") from None
        except TextWorkerDied:
            raise ApiError(400, f"{param} cannot be processed: the text worker ended on it", param) from None
        finally:
            if healthy is None:
                self.restarts += 1
                self.on_restart()
                self._replace(worker)
            else:
                self._idle.put_nowait(healthy)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, wire.TextError):
            raise ApiError(400, answer.text, param)
        raise ApiError(500, "the text worker gave an unexpected answer")

    async def _spawn_for_job(self) -> _Worker:
        """A worker in the place of one that could not be restarted; the place stays whatever happens."""
        try:
            return await self._spawn()
        except BaseException as error:
            self._idle.put_nowait(None)
            if isinstance(error, (TextWorkerDied, ConfigError, OSError)):
                raise ApiError(503, "no text worker could be started; try again a little later") from None
            raise

    def _replace(self, worker: _Worker) -> None:
        """Kill a worker that is late or was abandoned in mid-job, and start the next one at once."""

        async def again() -> None:
            await self._forget(worker)
            fresh: _Worker | None = None
            try:
                fresh = None if self._closed else await self._spawn()
            except (TextWorkerDied, ConfigError, OSError) as error:
                log.error("a text worker did not start (%s); the next request tries again", type(error).__name__)
            self._idle.put_nowait(fresh)

        task = asyncio.get_running_loop().create_task(again())
        self._restarting.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._restarting.discard)

    async def _forget(self, worker: _Worker) -> None:
        self._all.discard(worker)
        await worker.kill()

    async def _spawn(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, close_fds=True)
        worker = _Worker(process)
        self._all.add(worker)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                greeting = await worker.ask(None)
        except (TextWorkerDied, TimeoutError) as error:
            await self._forget(worker)
            raise TextWorkerDied(f"a text worker did not start ({type(error).__name__})") from None
        if not isinstance(greeting, wire.TextReady):
            await self._forget(worker)
            raise ConfigError(greeting.text if isinstance(greeting, wire.TextError) else "a text worker did not greet")
        self.facts = greeting
        return worker


async def _ask_within(worker: _Worker, job: msgspec.Struct, deadline_s: float) -> wire.FromText:
    """The answer, or TimeoutError after deadline_s; later when the machine, not the text, kept the worker waiting."""
    before_s = worker.cpu_s()
    asking = asyncio.ensure_future(worker.ask(job))
    try:
        done, _ = await asyncio.wait({asking}, timeout=deadline_s)
        if not done and worker.cpu_s() - before_s < deadline_s / 2:
            done, _ = await asyncio.wait({asking}, timeout=deadline_s * WAITING_FACTOR)
        if not done:
            raise TimeoutError
        return asking.result()
    finally:
        asking.cancel()


def _within(done: wire.Encoded, max_tokens: int, param: str) -> wire.Encoded:
    """What came, or ApiError 400 when there were too many ids to send."""
    if done.count > max_tokens:
        raise ApiError(400, f"{param} has {done.count} tokens; the model's context is {max_tokens} tokens", param,
                       "context_length_exceeded")
    return done
