"""A fault of ours in one request ends that request: in the detokenizer, in a route, in the mailbox's reader.

The application runs in this process over a dummy engine client, so that faults can be planted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.core.clock import VirtualClock
from engine.core.config import ServerConfig
from engine.core.seeds import SeedSource
from engine.serve import wire
from engine.serve.app import build_app
from engine.serve.engine_client import EngineFailed
from engine.serve.generation import Tools
from engine.serve.ids import Limits
from engine.serve.mailbox import Mailbox
from engine.serve.metrics import Metrics
from engine.serve.services import Keys, Services
from engine.serve.text_pool import TextPool
from engine.tokenization import Detokenizer, load_tokenizer
from tests.serve.harness import tiny_folder


class DummyEngine:
    """Echoes each sample's prompt, one token a turn of the event loop."""

    state = "ready"

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.adds: list[wire.Add] = []
        self.dead = False

    def add(self, samples: Sequence[wire.Add], mailbox: Mailbox) -> None:
        if self.dead:
            raise EngineFailed("the engine process ended")
        self.adds += samples
        for index, sample in enumerate(samples):
            asyncio.get_running_loop().create_task(self._play(sample, index, mailbox))

    async def _play(self, sample: wire.Add, index: int, mailbox: Mailbox) -> None:
        mailbox.accept()
        for count in range(sample.sampling.max_tokens):
            await asyncio.sleep(0)
            done = count + 1 == sample.sampling.max_tokens
            mailbox.put(index, [sample.prompt[count % len(sample.prompt)]], "length" if done else None)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.aborted += request_ids


@pytest.fixture
def services(tmp_path: Path) -> Services:
    """State of a server without processes."""
    folder = tiny_folder(tmp_path)
    metrics = Metrics()
    found = Services(ServerConfig(), metrics, Keys([]), Keys([]), Keys([]), engine=DummyEngine())  # type: ignore[arg-type]
    found.limits = Limits(("tiny",), 64, 512, {})
    found.tools = Tools(found.engine, load_tokenizer(folder), (1,), VirtualClock(5.0), metrics, SeedSource(0))  # type: ignore[arg-type]
    found.text = TextPool(str(folder), 1)
    return found


def talk(services: Services, job: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run a client against the application itself."""
    async def run() -> None:
        transport = httpx.ASGITransport(build_app(services), raise_app_exceptions=True)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await job(http)

    asyncio.run(run())


BODY: dict[str, Any] = {"prompt": [40, 41], "max_tokens": 4}


def failures(services: Services) -> float:
    """Faults counted."""
    return float(services.metrics.failures._value.get())


def test_a_fault_in_the_detokenizer_ends_one_request(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 once or an error event, counted, the engine told, every seat given back; the next request is fine."""
    real = Detokenizer.push

    def broken(self: Detokenizer, ids: Sequence[int]) -> Any:
        if ids and ids[0] == 41:
            raise KeyError("a secret")
        return real(self, ids)

    async def job(http: httpx.AsyncClient) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, "push", broken)
            plain = await http.post("/v1/completions", json=BODY)
            assert plain.status_code == 500 and plain.json()["error"]["type"] == "server_error"
            assert "secret" not in plain.text
            assert len(services.engine.aborted) == 1  # type: ignore[union-attr]
            stream = await http.post("/v1/completions", json={**BODY, "stream": True})
            last = [line for line in stream.text.splitlines() if line][-1]
            assert stream.status_code == 200 and "error" in json.loads(last.removeprefix("data: "))
            assert len(services.engine.aborted) == 2  # type: ignore[union-attr]
        assert failures(services) == 2
        assert (await http.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == "EFEF"
        assert (services.generating, services.reserved_samples, services.bodies_bytes) == (0, 0, 0)

    talk(services, job)


def test_a_fault_in_metrics_ends_that_scrape(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Monitoring never takes the service down."""
    monkeypatch.setattr(services.metrics, "take_dropped_lines", lambda count: 1 / 0)

    async def job(http: httpx.AsyncClient) -> None:
        assert (await http.get("/metrics")).status_code == 500
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200

    talk(services, job)
    assert failures(services) == 1


def test_an_engine_that_has_just_gone_is_a_503(services: Services) -> None:
    """Between its death and our noticing, adding fails; that is not the client's fault nor a secret."""
    services.engine.dead = True  # type: ignore[union-attr]

    async def job(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/completions", json=BODY)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert (services.generating, services.reserved_samples) == (0, 0)

    talk(services, job)


def test_what_the_engine_is_asked(services: Services) -> None:
    """Seeds, eos and stop ids, limits: exactly what the request says, for every sample."""
    async def job(http: httpx.AsyncClient) -> None:
        await http.post("/v1/completions", json={**BODY, "n": 2, "seed": -1, "stop_token_ids": [9], "priority": -4,
                                                 "temperature": 1e-30, "top_k": 5, "top_p": 0.5, "min_p": 0.25})
        await http.post("/v1/completions", json={**BODY, "ignore_eos": True, "max_tokens": None})

    talk(services, job)
    first, second, third = services.engine.adds  # type: ignore[union-attr]
    assert (first.stop_ids, first.priority, first.arrival_s) == ([1, 9], -4, 5.0)
    assert (first.sampling.seed, second.sampling.seed) == (2**64 - 1, 0)
    asked = first.sampling
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p) == (0, 5, 0.5, 0.25)
    assert third.stop_ids == [] and third.sampling.max_tokens == 16 and third.sampling.ignore_eos
    assert third.sampling.seed == SeedSource(0).next() != SeedSource(1).next()
    assert len({add.request_id for add in (first, second, third)}) == 3


def test_a_mailbox_merges_and_never_loses() -> None:
    """However the writer and the reader interleave, the reader sees every token once, in order, and the end."""
    async def run() -> None:
        box = Mailbox(2)
        seen: dict[int, list[int]] = {0: [], 1: []}
        ended = 0

        async def write() -> None:
            for i in range(200):
                box.put(i % 2, [i], "length" if i >= 198 else None)
                if i % 7 == 0:
                    await asyncio.sleep(0)

        task = asyncio.create_task(write())
        while ended < 2:
            for index, piece in (await box.take()).items():
                seen[index] += piece.tokens
                ended += piece.finish_reason is not None
        await task
        assert seen == {0: list(range(0, 200, 2)), 1: list(range(1, 200, 2))}

    asyncio.run(asyncio.wait_for(run(), 5))
