"""From a configuration to a serving process and back to an exit status.

Order: take the port (or say who cannot), start the engine process (it imports while we go on), find the model, then
serve. It does not parse flags and has no routes. SIGTERM and SIGINT drain; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.clock import MonotonicClock
from engine.core.config import DEFAULT_MODEL, ServerConfig
from engine.core.errors import ConfigError, named
from engine.serve import child
from engine.serve.engine_client import ENGINE_COMMAND, EngineClient, EngineFailed, EngineProcess
from engine.serve.flags import Launch
from engine.serve.text_pool import TextPool, TextWorkerDied

if TYPE_CHECKING:
    from engine.serve.services import Services

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 30
LAST_FRAMES_S = 1.0  # for error events to leave after the engine has died
SHOW_DEATH_S = 1.0  # for health checks to see the 503 before the process ends
CLOSE_CONNECTIONS_S = 3
LAG_SAMPLE_S = 0.1


def listen(config: ServerConfig) -> socket.socket:
    """The listening socket, before anything is loaded. Raises ConfigError naming address and port."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}; "
                          "use another --port (0 takes a free one) or --host") from None
    listener.setblocking(False)
    return listener


def model_names(launch: Launch, folder: Path) -> tuple[str, ...]:
    """What clients may call the model: --served-model-name, or what --model says and the last part of it."""
    if launch.server.served_model_name:
        return launch.server.served_model_name
    given = launch.engine.model or DEFAULT_MODEL
    return tuple(dict.fromkeys((given, Path(given).name.removesuffix(".gguf") or folder.name)))


def curl_line(launch: Launch, address: tuple[str, int], name: str, *, chat: bool) -> str:
    """A command that works as it is printed (with a key: after API_KEY is set)."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    base = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    body: dict[str, Any] = {"model": name, "max_tokens": 32, "temperature": 0}
    question = "What is the capital of France?"
    body |= {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": "The capital of France is"}
    route = "chat/completions" if chat else "completions"
    key = ' -H "Authorization: Bearer $API_KEY"' if launch.api_keys else ""
    return (f"curl {base}/v1/{route} -H 'Content-Type: application/json'{key} "
            f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}")


def say(line: str) -> None:
    """Print for people; a full disk or a closed terminal is no reason to stop serving."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class Supervisor:
    """The server process's life, inside its event loop."""

    def __init__(self, launch: Launch, services: Services, process: EngineProcess, folder: Path,
                 listener: socket.socket) -> None:
        self.launch = launch
        self.services = services
        self.process = process
        self.folder = folder
        self.listener = listener
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    def drain(self) -> None:
        """The first call: take no new requests and end when the running ones have. The second: end now."""
        if self.services.draining:
            self._now.set()
        self.services.draining = True
        self._stop.set()

    async def run(self) -> int:
        """Serve until drained or dead. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # logs go to standard error; there is no file to open again
        engine = EngineClient(self.process)
        self.services.engine = engine
        http, serving = self._start_http()
        lag = loop.create_task(self._watch_lag())
        try:
            status = await self._start_and_wait(engine)
        except (EngineFailed, ConfigError, TextWorkerDied) as error:
            status = 2 if isinstance(error, ConfigError) else getattr(error, "exit_status", 1)
            log.error("%s", named(error))
        http.should_exit = True
        await serving
        lag.cancel()
        if self.services.text is not None:
            await self.services.text.close()
        await engine.close()
        return status

    async def _start_and_wait(self, engine: EngineClient) -> int:
        starting = asyncio.ensure_future(self._start_model(engine))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return 0  # told to stop while loading
            starting.result()
            await asyncio.wait((engine.died, stopping), return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set() and not engine.died.done():
                await self._wait_for_running(engine)
            if not engine.died.done():
                return 0
            log.error("%s", engine.died.result())
            await self._settle(LAST_FRAMES_S)
            await asyncio.sleep(SHOW_DEATH_S)
            return 1
        finally:
            for task in (starting, stopping):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineFailed, ConfigError, TextWorkerDied):
                await starting

    async def _start_model(self, engine: EngineClient) -> None:
        """Engine, text workers and tokenizer at once; then fill in the services and say that we are ready."""
        from engine.core.seeds import SeedSource
        from engine.loading.spec import read_config
        from engine.patching.served import announce, patch_folder
        from engine.serve.generation import Tools
        from engine.serve.ids import Limits
        from engine.serve.reduction import ReductionSampler, context_card, context_of
        from engine.tokenization import load_tokenizer

        tokens = self.launch.engine.tokenizer or str(self.folder)
        services, spec = self.services, read_config(self.folder)
        patch = patch_folder(self.folder, self.launch.engine.patch, self.launch.engine.tokenizer)
        text = TextPool(tokens, self.launch.server.text_workers, patch=None if patch is None else str(patch))
        text.on_restart = services.metrics.text_restarts.inc
        services.text = text
        engine.on_stats = services.metrics.take_stats
        engine.on_queued = services.metrics.queue_s.observe
        engine.on_progress = ProgressLine()
        loop = asyncio.get_running_loop()
        tokenizer, facts, _ = await asyncio.gather(
            loop.run_in_executor(None, load_tokenizer, tokens, patch), engine.start(), text.start())
        services.metrics.know_pages(facts.page_bytes, facts.pages_per_group, facts.pool_groups)
        names = model_names(self.launch, self.folder)
        defaults = {name: value for name, value in dataclasses.asdict(spec.generation).items() if value is not None}
        base_size, base_lengths, sampler = None, None, None
        artefact = getattr(tokenizer, "artefact", None)  # a patched vocabulary's
        if artefact is not None and patch is not None:
            base_size, base_lengths = artefact.base_vocab_size, [len(old) for old in artefact.old_ids]
            announce(artefact, patch, self.folder)
            sampler = ReductionSampler(text, engine.sampled)
        reduction, context = context_of(self.launch.engine, patch, facts.max_model_len)
        services.card_extra = context_card(context, reduction.domain)
        services.metrics.know_domain(reduction.domain)
        services.limits = Limits(names, facts.max_model_len, facts.vocab_size, defaults, base_size, tokenizer.to_new_id)
        services.tools = Tools(engine, tokenizer, tuple(facts.eos_ids), MonotonicClock(), services.metrics,
                               SeedSource(self.launch.engine.seed), base_lengths, sampler)
        gc.collect()
        gc.freeze()  # libraries and vocabulary: the collector need not walk them while clients wait
        engine.on_progress("ready")
        log.info("%s", facts.summary)
        address = self.listener.getsockname()[:2]
        say(f"Ready. {curl_line(self.launch, address, names[0], chat=text.facts.has_template)}")

    def _start_http(self) -> tuple[Any, asyncio.Task[None]]:
        import uvicorn

        from engine.serve.app import build_app
        from engine.serve.http11 import MAX_HEADER_BYTES, GuardedProtocol

        class Server(uvicorn.Server):
            """uvicorn without its signal handlers: the supervisor decides when to end."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            build_app(self.services, self.drain), http=GuardedProtocol, ws="none", lifespan="off", log_config=None,  # type: ignore[arg-type]
            access_log=False, server_header=False, proxy_headers=False, backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES)
        server = Server(config)
        task = asyncio.get_running_loop().create_task(server.serve(sockets=[self.listener]))
        return server, task

    async def _wait_for_running(self, engine: EngineClient) -> None:
        """Let running requests finish within the grace period; then, or when told again, end them with an error."""
        log.info("draining: %d requests running, at most %.0f s", self.services.generating, self.launch.server.grace_s)
        clock = MonotonicClock()
        end_s = clock.now_s() + self.launch.server.grace_s
        while self.services.generating and not self._now.is_set() and not engine.died.done():
            if clock.now_s() >= end_s:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), 0.05)
        if self.services.generating and not engine.died.done():
            engine.fail_all("the server is shutting down", 503)
            await self._settle(LAST_FRAMES_S)

    async def _settle(self, seconds: float) -> None:
        """Give handlers a moment to send what they have."""
        clock = MonotonicClock()
        end_s = clock.now_s() + seconds
        while self.services.generating and clock.now_s() < end_s:
            await asyncio.sleep(0.02)

    async def _watch_lag(self) -> None:
        """How late the event loop runs: the worst of about the last second."""
        clock = MonotonicClock()
        recent = [0.0] * 10
        while True:
            before_s = clock.now_s()
            await asyncio.sleep(LAG_SAMPLE_S)
            recent = [*recent[1:], clock.now_s() - before_s - LAG_SAMPLE_S]
            self.services.loop_lag_s = max(recent)


class ProgressLine:
    """Shows the engine's progress: a bar on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, text: str) -> None:
        """Show one line in place of the last."""
        if not sys.stderr.isatty():
            return
        end = "\n" if text == "ready" else ""
        with contextlib.suppress(OSError):
            sys.stderr.write("\r" + text.ljust(len(self._shown)) + end)
            sys.stderr.flush()
        self._shown = text


def make_services(launch: Launch) -> Services:
    """The shared state of one server."""
    from engine.serve.metrics import Metrics
    from engine.serve.services import Keys, Services

    admin, metrics = launch.server.admin_key, launch.server.metrics_key
    return Services(launch.server, Metrics(), Keys(launch.api_keys), Keys([admin] if admin else []),
                    Keys([metrics] if metrics else []))


def find_model(launch: Launch) -> Path:
    """The folder to serve; converts or downloads if need be, before there is a server. Raises LoadError."""
    from engine.loading.resolve import resolve_model

    return resolve_model(launch.engine.model, weights=launch.engine.load_format != "dummy")


def serve(launch: Launch, *, engine_command: Sequence[str] = ENGINE_COMMAND,
          find: Callable[[Launch], Path] = find_model) -> int:
    """Serve until told to stop. Returns the exit status: 0 drained, 1 the engine died, 2 the user can fix it."""
    log_lines = child.log_to_stderr(launch.server.log_level)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its warnings are about clients; ours are counted
    listener = listen(launch.server)
    process = EngineProcess(engine_command)
    try:
        folder = find(launch)
        process.configure(dataclasses.replace(launch.engine, model=str(folder)), launch.server.log_level)
        import uvloop

        async def main() -> int:
            services = make_services(launch)
            services.dropped_lines = lambda: log_lines.dropped
            return await Supervisor(launch, services, process, folder, listener).run()

        return uvloop.run(main())
    except EngineFailed as error:
        log.error("%s", error)
        return error.exit_status
    finally:
        process.close()
        listener.close()
