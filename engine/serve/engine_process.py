"""The engine's own process: `python -m engine.serve.engine_process`, started by the server, never by hand.

It turns messages into EngineLoop calls and updates into messages. It knows no text, no HTTP and no torch; whoever
builds the loop does. One thread steps, one says "alive" once a second, one waits for the parent's end.

Life: die with the parent -> import -> read one EngineStart frame -> build -> Facts -> [poll, add or abort, step, send].
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from engine.core.clock import MonotonicClock
from engine.core.config import EngineConfig
from engine.core.errors import ConfigError, RequestError, named
from engine.core.executor import Executor
from engine.core.heap import settle_heap
from engine.core.plan import StepPlan, StepResult, Update
from engine.core.request import Request, SamplingParams
from engine.serve import child, wire

log = logging.getLogger(__name__)

BEAT_S = 1.0
STATS_S = 0.1
IDLE_POLL_MS = 1000
MAX_STEP_FAILURES_IN_A_ROW = 3


class Loop(Protocol):
    """The part of EngineLoop that this process uses."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> Any: ...
    def abort(self, request_id: str) -> Any: ...
    def set_kv_limit(self, groups: int) -> int: ...
    def step(self) -> list[Update]: ...
    def observe(self, side: str, base_tokens: int, tokens: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """An engine ready to step. first_scheduled: seq_ids (as add() returned them) scheduled since it was last asked."""

    loop: Loop
    facts: wire.Facts
    first_scheduled: Callable[[], list[int]] = list


Report = Callable[[str], None]
Build = Callable[[EngineConfig, Report], Built]


class WatchedExecutor:
    """An executor that notes which sequences a plan admits for the first time; everything else passes through."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._admitted: list[int] = []

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        self._admitted += [admission.seq_id for admission in plan.admissions if admission.epoch == 0]
        self._inner.submit(plan)

    def wait(self) -> StepResult:
        """See Executor."""
        return self._inner.wait()

    def close(self) -> None:
        """See Executor."""
        self._inner.close()

    def take(self) -> list[int]:
        """Who was admitted since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted


def to_request(message: wire.Add) -> Request:
    """The engine's view of one sample. Raises RequestError."""
    asked = message.sampling
    params = SamplingParams(
        max_tokens=asked.max_tokens, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p,
        min_p=asked.min_p, seed=asked.seed, min_tokens=asked.min_tokens, ignore_eos=asked.ignore_eos,
        stop_token_ids=tuple(asked.stop_token_ids), logprobs=asked.logprobs, logit_bias=tuple(asked.logit_bias))
    return Request(message.request_id, tuple(message.prompt), params, message.arrival_s,
                   frozenset(message.stop_ids), message.priority, message.tenant)


class EngineService:
    """The loop of the process: socket in, step, socket out. Blocks on the socket when there is nothing to do."""

    def __init__(self, built: Built, socket: zmq.Socket[bytes]) -> None:
        self.loop = built.loop
        self._first_scheduled = built.first_scheduled
        self._arrivals_s: dict[int, float] = {}  # by seq_id, until first scheduled
        self.socket = socket
        self.step_errors = 0
        self.step_started_s = 0.0  # read by the heartbeat thread; 0 between steps
        self._clock = MonotonicClock()
        self._live: set[str] = set()
        self._failures_in_a_row = 0
        self._stats_s = 0.0
        self._last_stats: dict[str, float] = {}
        self._stopping = False

    def run(self) -> None:
        """Serve until told to stop. Raises what a step raises when that happens again and again."""
        while not self._stopping:
            busy = self.loop.has_work
            if not busy:
                self._send_stats(force=True)
                self.socket.poll(IDLE_POLL_MS)
            self._receive()
            if self.loop.has_work and not self._stopping:
                self._step()
                self._send_stats()

    def step_age_s(self) -> float:
        """Seconds that the step in progress has taken so far."""
        started_s = self.step_started_s
        return self._clock.now_s() - started_s if started_s else 0.0

    def _receive(self) -> None:
        """Handle every message that is there; a bad one is dropped and said."""
        while not self._stopping:
            try:
                raw = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode_to_engine(raw)
            except (msgspec.DecodeError, ValueError) as error:
                log.error("a message outside the schema was dropped (%s)", type(error).__name__)
                continue
            self._handle(message)

    def _handle(self, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Add):
            self._add(message)
        elif isinstance(message, wire.Abort):
            for request_id in message.request_ids:
                self._abort(request_id)
        elif isinstance(message, wire.SetKvLimit):
            self._send(self._set_kv_limit(message.groups))
        elif isinstance(message, wire.Sampled):
            self.loop.observe(message.side, message.base, message.own)
        else:
            self._stopping = True

    def _add(self, message: wire.Add) -> None:
        try:
            seq_id = self.loop.add(to_request(message))
        except RequestError as error:
            self._send(wire.Batch([_failure(message.request_id, str(error), 400, error.param)]))
        except Exception as error:  # one request's fault must not be everybody's
            self._count_failure("add", error)
            self._send(wire.Batch([_failure(message.request_id, "the engine failed on this request", 500)]))
        else:
            self._live.add(message.request_id)
            self._arrivals_s[seq_id] = message.arrival_s
            self._send(wire.Accepted(message.request_id))

    def _abort(self, request_id: str) -> None:
        self._live.discard(request_id)
        try:
            self.loop.abort(request_id)
        except Exception as error:
            self._count_failure("abort", error)

    def _set_kv_limit(self, groups: int) -> wire.KvLimit:
        try:
            return wire.KvLimit(200, self.loop.set_kv_limit(groups))
        except ConfigError as error:
            return wire.KvLimit(400, error=str(error)[:4096])
        except RequestError as error:
            return wire.KvLimit(409, error=str(error)[:4096])
        except Exception as error:
            self._count_failure("set_kv_limit", error)
            return wire.KvLimit(500, error="the engine failed to change the limit")

    def _step(self) -> None:
        self.step_started_s = self._clock.now_s()
        try:
            updates = self.loop.step()
            self._failures_in_a_row = 0
        except Exception as error:
            self._count_failure("step", error)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_STEP_FAILURES_IN_A_ROW:
                raise
            self._end_all()
            return
        finally:
            self.step_started_s = 0.0
        news = [
            wire.News(update.request_id, list(update.tokens), update.finish_reason,
                      update.error[:4096] if update.error else None, 500 if update.error else 0,
                      logprobs=update.logprobs)
            for update in updates if update.request_id in self._live
        ]
        for update in updates:
            if update.finish_reason is not None:
                self._live.discard(update.request_id)
        queued_s = self._queue_times()
        if news or queued_s:
            self._send(wire.Batch(news, queued_s))
        if not self._live:
            self._arrivals_s.clear()  # those that were aborted before they ran

    def _queue_times(self) -> list[float]:
        """Seconds that the sequences scheduled for the first time in this step had waited."""
        now_s = self._clock.now_s()
        found = (self._arrivals_s.pop(seq_id, None) for seq_id in self._first_scheduled())
        return [max(0.0, now_s - arrival_s) for arrival_s in found if arrival_s is not None]

    def _end_all(self) -> None:
        """A step that raised cannot say whose fault it was: every live request ends with an error, the loop goes on."""
        live, self._live = sorted(self._live), set()
        for request_id in live:
            self._abort(request_id)
        self._send(wire.Batch([_failure(name, "the engine failed in a step; try again", 500) for name in live]))

    def _count_failure(self, where: str, error: Exception) -> None:
        """Count and say where; never the message, which may quote a request."""
        self.step_errors += 1
        frames = traceback.extract_tb(error.__traceback__)
        at = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
        log.error("%s raised %s at %s", where, type(error).__name__, at)

    def _send(self, message: msgspec.Struct) -> None:
        self.socket.send(wire.encode(message), copy=True)

    def _send_stats(self, *, force: bool = False) -> None:
        """At most ten times a second, plus once whenever work ends; only what changed is worth a message."""
        now_s = self._clock.now_s()
        if now_s - self._stats_s < STATS_S and not force:
            return
        values = {key: float(value) for key, value in self.loop.stats().items() if isinstance(value, (int, float))}
        values["step_errors"] = float(self.step_errors)
        if values != self._last_stats:
            self._last_stats, self._stats_s = values, now_s
            self._send(wire.Stats(values))


def _failure(request_id: str, text: str, status: int, param: str | None = None) -> wire.News:
    return wire.News(request_id, [], "error", text[:4096], status, param)


def _beat(service: EngineService, control: child.FrameWriter) -> None:
    """The heartbeat thread. It says how old the step is, so that a long step and a hung process differ."""
    tick = threading.Event()
    while True:
        try:
            control.send(wire.Beat(service.step_age_s(), service.step_errors))
        except OSError:
            return  # the lifeline thread ends the process
        tick.wait(BEAT_S)


def serve(start: wire.EngineStart, control: child.FrameWriter, build: Build) -> int:
    """Build the engine, say so, and run until told to stop. Returns the exit status."""
    try:
        control.send(wire.Progress("loading the model"))
        built = build(start.config, lambda text: control.send(wire.Progress(text)))
    except ConfigError as error:
        control.send(wire.Failed(" ".join(named(error).split("\n"))[:4096], 2))
        return 2
    except Exception as error:
        log.debug("building the engine failed", exc_info=True)
        line = f"{type(error).__name__}: {error}".split("\n")[0]
        control.send(wire.Failed(f"the engine could not start: {line}"[:4096], 1))
        return 1
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.SNDHWM, 0)  # bounded by max_tokens of what runs; a slow server never blocks a step
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        socket.connect(start.address)
        service = EngineService(built, socket)
        settle_heap()
        threading.Thread(target=_beat, args=(service, control), name="heartbeat", daemon=True).start()
        control.send(built.facts)
        try:
            service.run()
        finally:
            built.loop.close()
    return 0


def build_real(config: EngineConfig, report: Report) -> Built:
    """The engine of this tree, and what the server must know of it."""
    import torch

    from engine.build import build_engine, geometry_of, resolve

    def count(done: int, total: int) -> None:
        if done == total or done % 16 == 0:
            report(f"loading weights: {done} of {total} tensors")

    resolution = resolve(config)
    resolved, spec, _ = resolution
    assert resolved.max_model_len is not None
    geometry = geometry_of(spec, resolved, getattr(torch, resolved.dtype))
    loop = build_engine(config, progress=count, resolution=resolution)
    pool_groups = loop.scheduler.ledger.total_groups  # a derived pool may have become smaller while it was built
    watched = WatchedExecutor(loop.executor)
    loop.executor = watched
    length = resolved.max_model_len
    summary = f"{spec.architecture}, {resolved.dtype}, {resolved.max_num_seqs} slots of {length} tokens, " \
              f"{pool_groups * geometry.group_bytes >> 20} MiB of KV"
    facts = wire.Facts(length, spec.vocab, list(spec.eos_ids), resolved.kv_page_bytes, geometry.pages_per_group,
                       pool_groups, summary)
    return Built(loop, facts, watched.take)


def main(build: Build = build_real, warm_up: Callable[[], Any] | None = None) -> int:
    """Entry of the process. warm_up: imports worth doing before the configuration arrives. Returns the exit status."""
    child.die_with_parent()
    child.leave_signals_to_parent()
    control = child.FrameWriter(child.claim_stdout())
    if warm_up is not None:
        warm_up()
    start = child.read_frame(0, wire.decode_start)
    if start is None or os.getppid() != start.parent_pid:
        return 1
    child.log_to_stderr(start.log_level)
    child.exit_when_closed(0)
    try:
        return serve(start, control, build)
    except Exception as error:
        log.error("the engine process ends: %s", type(error).__name__)
        return 70


def _import_engine() -> None:
    """Import torch and the rest while the server resolves the model; what fails here fails again below."""
    try:
        import engine.build  # noqa: F401
    except ImportError:
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    status = main(warm_up=_import_engine)
    sys.stderr.flush()
    os._exit(status)  # pages are given back; a slow interpreter teardown would only delay the exit
