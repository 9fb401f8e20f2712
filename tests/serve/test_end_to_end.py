"""The whole server over the real engine and SmolLM2: answers, streams, samples, leaving clients, faults, memory."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models import smollm2_dir
from tests.serve.harness import REAL, ROOT, Server, launch, stop, wait_ready, wait_until

NAME = "smollm2"
PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the module: fp32, so that greedy texts do not depend on what else runs."""
    flags = ["--model", str(smollm2_dir()), "--served-model-name", NAME, "--dtype", "float32", "--max-model-len",
             "1024", "--max-num-seqs", "16", "--kv-pool-bytes", "256MiB", "--kv-release-after", "0.2"]
    found = launch(tmp_path_factory.mktemp("real"), *flags, module=REAL)
    try:
        wait_ready(found, 90)
        yield found
    finally:
        stop(found)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_capital_of_france(client: openai.OpenAI) -> None:
    """It is a language model, and it stops by itself."""
    made = client.chat.completions.create(model=NAME, messages=PARIS, temperature=0, max_tokens=40)
    assert "Paris" in (made.choices[0].message.content or "") and made.choices[0].finish_reason == "stop"


def test_the_ready_line_is_a_curl_that_works(server: Server) -> None:
    """Exactly one line, to be copied into a shell."""
    lines = [line for line in server.text().splitlines() if line.startswith("Ready. curl ")]
    assert len(lines) == 1
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = shlex.split(lines[0].removeprefix("Ready. "))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    """Chat and completions, byte for byte."""
    ask: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 24}
    for prompt in ("The story of the little", "Zürich, 東京 and 🙂"):
        whole = client.completions.create(prompt=prompt, **ask).choices[0].text
        assert whole == "".join(c.choices[0].text for c in client.completions.create(prompt=prompt, stream=True, **ask))
    whole = client.chat.completions.create(messages=PARIS, **ask).choices[0].message.content or ""
    chunks = client.chat.completions.create(messages=PARIS, stream=True, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_seeds_and_samples(client: openai.OpenAI) -> None:
    """The same seed gives the same text, another one another; n samples differ; sample 0 is the single sample."""
    ask: dict[str, Any] = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 1.0}
    texts = [client.completions.create(seed=seed, **ask).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    many = client.completions.create(seed=5, n=3, **ask)
    assert many.choices[0].text == texts[0] and len({choice.text for choice in many.choices}) == 3
    assert many.usage is not None and many.usage.completion_tokens == 48


def test_stop_strings_and_min_tokens(client: openai.OpenAI) -> None:
    """The text ends before the stop string; min_tokens holds it off."""
    ask: dict[str, Any] = {"model": NAME, "prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    assert "7" in whole
    made = client.completions.create(stop=["7"], **ask)
    assert made.choices[0].text == whole[: whole.index("7")] and made.choices[0].finish_reason == "stop"
    later = client.completions.create(stop=["7"], extra_body={"min_tokens": 30}, **ask)
    assert later.usage is not None and later.usage.completion_tokens >= 30


def test_the_length_limit(client: openai.OpenAI) -> None:
    """A context is used to its last token and not beyond."""
    made = client.completions.create(model=NAME, prompt=[504] * 1000, max_tokens=24, extra_body={"ignore_eos": True})
    assert made.usage is not None and made.usage.total_tokens == 1024 and made.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="at most 24 can follow"):
        client.completions.create(model=NAME, prompt=[504] * 1000, max_tokens=25)


def test_many_at_once_equal_the_same_alone_and_leavers_free_their_places(server: Server) -> None:
    """Half of the clients leave at random moments; the others' texts are those they get alone; memory comes back."""
    rng = random.Random(3)
    prompts = [f"{word} number {i} is" for i, word in enumerate(["Apple", "River", "King", "Prime"] * 5)]
    ask: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}

    async def one(http: openai.AsyncOpenAI, prompt: str) -> str:
        return (await http.completions.create(prompt=prompt, **ask)).choices[0].text

    async def leaver(http: openai.AsyncOpenAI, prompt: str, after_s: float) -> None:
        with pytest.raises((TimeoutError, openai.APITimeoutError)):
            await asyncio.wait_for(http.completions.create(prompt=prompt, **{**ask, "max_tokens": 900}), after_s)

    async def storm() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="x", max_retries=0, timeout=90) as http:
            alone = [await one(http, prompt) for prompt in prompts[:6]]
            got, _ = await asyncio.gather(
                asyncio.gather(*(one(http, prompt) for prompt in prompts)),
                asyncio.gather(*(leaver(http, prompt, rng.uniform(0.05, 1.5)) for prompt in prompts)))
            assert got[:6] == alone

    asyncio.run(storm())
    assert wait_until(lambda: server.gauge("tessera_requests_running") == 0, 1.0)
    assert wait_until(lambda: server.gauge("tessera_kv_pages_used") == 0, 1.0)
    assert wait_until(lambda: server.gauge("tessera_kv_pages_mapped") == 0, 3.0), "kept pages were not given back"


def test_metrics_of_a_real_run(server: Server, client: openai.OpenAI) -> None:
    """Queue time, first token, token to token: counted once each, in a sane order."""
    names = ("queue_time_seconds", "ttft_seconds", "e2e_seconds", "time_between_tokens_seconds")
    before = {name: server.gauge(f"tessera_{name}_count") for name in names}
    client.completions.create(model=NAME, prompt="x", max_tokens=5, extra_body={"ignore_eos": True})
    assert {name: server.gauge(f"tessera_{name}_count") - before[name] for name in names} == {
        "queue_time_seconds": 1, "ttft_seconds": 1, "e2e_seconds": 1, "time_between_tokens_seconds": 4}
    assert server.gauge("tessera_kv_pages") > 0 and server.gauge("tessera_engine_steps_total") > 5


def test_sigkill_of_the_engine_is_survived_by_the_truth(server: Server) -> None:
    """The last test of this server: streams end with an error event, status 1, nothing is left."""
    with server.client() as http:
        body = {"model": NAME, "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            begin_s = time.monotonic()
            os.kill(server.engine_pid, signal.SIGKILL)
            last = list(lines)[-1]
        assert "error" in json.loads(last.removeprefix("data: ")) and time.monotonic() - begin_s < 2
    assert server.process.wait(10) == 1


def _broken(folder: Path, how: str) -> Path:
    """A copy of SmolLM2's folder with one thing wrong."""
    good = smollm2_dir()
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).symlink_to(file)
    name = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}.get(how, "config.json")
    (folder / name).unlink()
    if how == "weights":
        with (good / name).open("rb") as source:
            (folder / name).write_bytes(source.read(1 << 20))
    elif how == "architecture":
        (folder / name).write_text((good / name).read_text().replace("LlamaForCausalLM", "EvilForCausalLM"))
    else:
        (folder / name).write_text("{")
    return folder


@pytest.mark.parametrize(("how", "words"), [
    ("missing", "no such folder"), ("config", "config.json"), ("tokenizer", "tokenizer.json"),
    ("weights", "model.safetensors"), pytest.param("architecture", "EvilForCausalLM", marks=pytest.mark.slow),
    pytest.param("length", "use --max-model-len", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_model_that_cannot_be_served_is_one_line(tmp_path: Path, how: str, words: str) -> None:
    """Exit status 2 within 10 s (more on a loaded machine), the file named, no traceback, nothing left running."""
    flags = ["--model", str(tmp_path / "model")]
    if how == "length":
        flags = ["--model", str(smollm2_dir()), "--max-model-len", "8192", "--kv-pool-bytes", "8MiB"]
    elif how != "missing":
        _broken(tmp_path / "model", how)
    done = subprocess.run([sys.executable, "-m", REAL, "--port", "0", "--log-level", "error", *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr


@pytest.mark.slow
def test_a_preemption_storm_ends_and_changes_no_text(tmp_path: Path) -> None:
    """KV for a fraction of what runs: everything finishes, equal to the same alone, with few preemptions each."""
    flags = ["--model", str(smollm2_dir()), "--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "512",
             "--max-num-seqs", "32", "--kv-pool-bytes", "48MiB", "--kv-page-bytes", "256KiB"]  # fmt: skip
    server = launch(tmp_path, *flags, module=REAL)
    ask: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
    prompts = [f"Chapter {i}. " * 8 for i in range(24)]

    async def storm() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="x", max_retries=0, timeout=200) as http:
            async def one(prompt: str) -> str:
                return (await http.completions.create(prompt=prompt, **ask)).choices[0].text

            alone = [await one(prompt) for prompt in prompts[:3]]
            got = await asyncio.gather(*(one(prompt) for prompt in prompts))
            assert got[:3] == alone

    try:
        wait_ready(server, 90)
        asyncio.run(storm())
        assert 0 < server.gauge("tessera_preemptions_total") <= 3 * len(prompts)
        assert wait_until(lambda: server.gauge("tessera_kv_pages_used") == 0, 3)
    finally:
        assert stop(server) == 0
