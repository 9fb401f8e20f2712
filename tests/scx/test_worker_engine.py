"""Engines with a secure worker: the tokens of the local side; and when the worker dies, stalls or returns, requests
fail closed, the engine stays, and nothing is written in plaintext.

Workers here are real processes, killed and stopped by real signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.errors import ConfigError
from engine.core.loop import EngineLoop
from engine.core.plan import Update
from engine.core.request import Request, SamplingParams
from engine.scx import frames, remote, sessions
from engine.scx import link as links
from engine.scx.errors import WorkerLost
from engine.scx.remote import RemoteSecureSide
from tests import models
from tests.engine import oracle
from tests.scx.workers import end, key_file, start_process
from tests.scx.workers import remote as connect

OUTPUTS = 16
SMALL_POOL = {"kv_page_bytes": 4096, "kv_pool_bytes": None, "max_model_len": 128, "kv_pool_groups": 46}
CASES: dict[str, dict[str, Any]] = {
    "perm": {"scx_layers": "0,2"},
    "chunks": {"scx_layers": "all", "scx_scheme": "rotate", "chunk_tokens": 7},
    "preempted": {"scx_layers": "0,2", "scx_scheme": "mix", "scx_page_seal": True, "scx_seal_tokens": 8, **SMALL_POOL},
    "whole": {"scx_layers": "0", "scheduler": "orca", "max_model_len": 128},
    "batches": {"scx_layers": "0", "scheduler": "vllm", "max_model_len": 128, "scx_page_seal": True},
    "segments": {"scx_layers": "1", "scx_scheme": "mix", "scx_segment_tokens": 16, "chunk_tokens": 32},
}


class Counted:
    """In place of `secrets` in the sessions: the same nonces in every engine."""

    def __init__(self) -> None:
        self.count = 0

    def token_bytes(self, size: int) -> bytes:
        """The next one."""
        self.count += 1
        return self.count.to_bytes(size, "big")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers, float32."""
    return models.tiny_llama_dir(tmp_path_factory.mktemp("tiny"), 21, num_hidden_layers=3)


class Place:
    """An address whose worker may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.path, self.keys = str(folder / "worker"), key_file(folder)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """A worker at this address; its maps are the local side's."""
        self.process = start_process(self.path, self.keys, same_nonces=True)
        return self.process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One worker after the other at one address."""
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    end(made.process)


def requests(count: int = 8) -> list[Request]:
    """Half greedy, half sampled with a seed."""
    prompts = oracle.prompts(count, models.TINY_VOCAB, 5, 30, 80)
    return [
        Request(str(i), tuple(prompt), SamplingParams(
            temperature=0.0 if i % 2 else 0.8, top_p=0.9, seed=i, max_tokens=OUTPUTS, ignore_eos=True), i * 1e-6)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def run(engine: EngineLoop, many: list[Request]) -> dict[str, tuple[list[int], str]]:
    """Tokens and finish reason (or error) of each request."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in many}
    ends: dict[str, str] = {}
    for request in many:
        engine.add(request)
    while engine.has_work:
        take(engine.step(), tokens, ends)
    return {name: (tokens[name], ends[name]) for name in tokens}


def take(updates: list[Update], tokens: dict[str, list[int]], ends: dict[str, str]) -> None:
    """Sort news."""
    for update in updates:
        tokens[update.request_id] += update.tokens
        if update.finish_reason:
            ends[update.request_id] = update.error or update.finish_reason


def side_of(engine: EngineLoop) -> RemoteSecureSide:
    """Of an engine with a worker."""
    side = engine.executor.runner.scx.scx.secure  # type: ignore[attr-defined]
    assert isinstance(side, RemoteSecureSide)
    return side


def hear_logits(engine: EngineLoop) -> list[torch.Tensor]:
    """A list that gets every step's logits."""
    heard: list[torch.Tensor] = []
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    model = runner.model

    def said(batch: Any) -> torch.Tensor:
        heard.append(model(batch).clone())
        return heard[-1]

    runner.model = said
    return heard


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_local_sides(name: str, tiny: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled tokens, and every logit of every step, to the last bit."""
    found, preempted = [], 0
    for device in ("cpu", f"unix:{place.path}"):
        monkeypatch.setattr(sessions, "secrets", Counted())
        local = {"scx_key_file": str(place.keys)} if device == "cpu" else {}
        engine = oracle.make_engine(tiny, scx_secure_device=device, **CASES[name], **local)
        logits = hear_logits(engine)
        outputs = run(engine, requests())
        assert all(reason == "length" for _, reason in outputs.values())
        preempted = engine.stats()["preempted_total"]
        found.append((outputs, logits))
        engine.close()
    (wanted, before), (outputs, after) = found
    assert outputs == wanted and len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert name != "preempted" or preempted > 0, "nothing was preempted; the test proves nothing"


def test_the_environment_names_a_worker(tiny: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCX_SECURE_DEVICE=unix:PATH."""
    monkeypatch.setenv("SCX_ENC_LAYERS", "1")
    monkeypatch.setenv("SCX_SECURE_DEVICE", f"unix:{place.path}")
    engine = oracle.make_engine(tiny)
    assert side_of(engine).config.layers == (1,)
    assert run(engine, requests(1))["0"][1] == "length"
    engine.close()


def encoded_rows(engine: EngineLoop, layers: tuple[int, ...], tokens: int) -> list[torch.Tensor]:
    """Copies of the first rows of the slots in use, K and V of each layer."""
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    slots = sorted(runner.scx._slots.values())
    return [side[slots, :tokens].clone() for layer in layers for side in runner.store.layer_views(layer)]


def test_a_killed_worker_ends_requests_and_nothing_is_plain(tiny: Path, place: Place) -> None:
    """kill -9 between a layer's encode and its decode. Both requests end with an error at once, what they would have
    written in later layers is not written, no row is plaintext, the engine lives; the same address serves new
    requests, and an old session is never continued."""
    engine = oracle.make_engine(tiny, scx_layers="0,2", scx_secure_device=f"unix:{place.path}")
    scx: Any = engine.executor.runner.scx.scx  # type: ignore[attr-defined]
    many = requests(2)
    plain: list[torch.Tensor] = []  # value rows before encoding
    before: list[torch.Tensor] = []
    killed_s = 0.0

    def watch(view: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal killed_s
        if "qkv" not in tensors:
            return
        plain.append(tensors["qkv"].view(tensors["qkv"].shape[0], -1, 16)[:, -2:].clone())
        if len(plain) == 9:  # the fifth step's first encoded layer
            before.extend(encoded_rows(engine, (2,), 30))
            killed_s = time.monotonic()
            end(place.process)

    scx.observer = watch
    tokens: dict[str, list[int]] = {request.request_id: [] for request in many}
    ends: dict[str, str] = {}
    for request in many:
        engine.add(request)
    while not ends:
        take(engine.step(), tokens, ends)
    assert time.monotonic() - killed_s < 1
    assert set(ends) == {"0", "1"} and all("secure worker was lost" in text for text in ends.values())
    assert 0 < len(tokens["0"]) < OUTPUTS
    for was, now in zip(before, encoded_rows(engine, (2,), 30), strict=True):
        assert torch.equal(was, now)
    secret_rows = torch.cat([row.flatten(0, 1) for row in plain])
    for side in encoded_rows(engine, (0, 2), 30):
        kept = side.flatten(0, -2)
        assert kept.any() and not (kept[:, None] == secret_rows[None]).all(dim=-1).any()
    assert run(engine, requests(3)) and engine.stats()["lost_steps_total"] == 0
    outcome = run(engine, [many[0]])["0"]
    assert outcome[0] == [] and "secure worker was lost" in outcome[1], "nobody serves, so nothing may run"
    scx.observer = None
    place.start()
    time.sleep(remote.AGAIN_S)
    again = run(engine, many)
    assert all(reason == "length" for _, reason in again.values())
    engine.close()


def test_sessions_do_not_survive_a_worker(tiny: Path, place: Place) -> None:
    """A worker that died and returned between two steps: what ran before fails by name, although an open() for a new
    request has connected again meanwhile; the new request runs in the same step."""
    engine = oracle.make_engine(tiny, scx_layers="0,2", scx_secure_device=f"unix:{place.path}")
    many = requests(3)
    wanted = run(engine, [many[2]])
    tokens: dict[str, list[int]] = {request.request_id: [] for request in many}
    ends: dict[str, str] = {}
    for request in many[:2]:
        engine.add(request)
    for _ in range(3):
        take(engine.step(), tokens, ends)
    end(place.process)
    place.start()
    engine.add(many[2])
    while engine.has_work:
        take(engine.step(), tokens, ends)
    assert ends.pop("2") == "length" and tokens["2"] == wanted["2"][0]
    assert len(ends) == 2 and all("secure worker was lost" in text for text in ends.values())
    assert side_of(engine).holds(0) is False
    engine.close()


def test_a_stopped_worker_is_lost_and_may_go_on(tiny: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: no beat for STALL_S ends the requests; when it runs again it has forgotten them and serves new ones."""
    monkeypatch.setattr(links, "STALL_S", 1.2)
    engine = oracle.make_engine(tiny, scx_layers="0,2", scx_secure_device=f"unix:{place.path}")
    many = requests(2)
    for request in many:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in many}
    ends: dict[str, str] = {}
    for _ in range(3):
        take(engine.step(), tokens, ends)
    os.kill(place.process.pid, signal.SIGSTOP)
    begin_s = time.monotonic()
    while engine.has_work:
        take(engine.step(), tokens, ends)
    waited_s = time.monotonic() - begin_s
    assert len(ends) == 2 and 1.2 <= waited_s < 4, (ends, waited_s)
    os.kill(place.process.pid, signal.SIGCONT)
    assert all(reason == "length" for _, reason in run(engine, many).values())
    engine.close()


def test_a_slow_answer_is_no_stall(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While beats come, a worker may take its time (a long prompt's rows); silence with beats ends at STUCK_S."""
    monkeypatch.setattr(links, "STALL_S", 1.0)
    monkeypatch.setattr(links, "STUCK_S", 2.2)
    monkeypatch.setattr(links, "WAKE_S", 0.7)  # longer than a beat, so that each wait sees one
    side = connect(place.path)
    assert side._link is not None
    monkeypatch.setattr(side._link, "send", lambda message: None)  # so no answer ever comes
    begin_s = time.monotonic()
    with pytest.raises(WorkerLost, match="silent"):
        side._link.call(frames.Open(0, b"n" * 16, b"", 0), frames.Opened)
    assert time.monotonic() - begin_s > 2
    side.shut()


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_told(tiny: Path, tmp_path: Path) -> None:
    """Its key file is not there: the engine's error names its status, the worker's log the file."""
    with pytest.raises(ConfigError, match="worker: the secure worker ended with status 2"):
        oracle.make_engine(tiny, scx_layers="0", scx_secure_device="worker", scx_key_file=str(tmp_path / "none"))


def test_an_engine_starts_and_ends_its_own_worker(tiny: Path) -> None:
    """--scx-secure-device worker: a child, restarted after a death, gone with the engine."""
    engine = oracle.make_engine(tiny, scx_layers="0", scx_secure_device="worker")
    own = side_of(engine)._own
    assert own is not None
    first = own.pid
    assert run(engine, requests(1))["0"][1] == "length"
    os.kill(first, signal.SIGKILL)
    end_s = time.monotonic() + 60
    while run(engine, requests(1))["0"][1] != "length":
        assert time.monotonic() < end_s, "it was not started again"
        time.sleep(0.2)
    second = own.pid
    assert second != first and own.alive
    folder = Path(own.path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    engine.close()
    assert not own.alive and not folder.exists() and not Path(f"/proc/{second}").exists()


def test_what_cannot_be_reached_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker at the address, and a key file that the engine should not have."""
    monkeypatch.setattr(remote, "FIND_S", 0.1)
    with pytest.raises(ConfigError, match="no secure worker answers.*start one: python -m engine.scx.secure_worker"):
        oracle.make_engine(tiny, scx_layers="0", scx_secure_device=f"unix:{tmp_path}/none")
    with pytest.raises(ConfigError, match="the worker holds the root secret"):
        oracle.make_engine(tiny, scx_layers="0", scx_secure_device="unix:/x", scx_key_file="y")
    with pytest.raises(ConfigError, match=r"unix:PATH \(of a running worker\)"):
        oracle.make_engine(tiny, scx_layers="0", scx_secure_device="unix:")
