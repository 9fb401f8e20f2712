"""The routes over the fake engine: what the official client sees, streams frame by frame, keys, metrics, text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.fake_engine import LENGTH, RAISE_ID, REFUSE_ID, STEP_RAISES_ID
from tests.serve.harness import Server, raw, running, tiny_folder, wait_until

MODEL = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the module."""
    tmp = tmp_path_factory.mktemp("http")
    folder = tiny_folder(tmp / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "temperature": 0.25}))
    with running(tmp, "--model", str(folder), "--served-model-name", "tiny,alias") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=30)


def frames(server: Server, route: str, body: dict[str, Any]) -> list[str]:
    """The data of every event."""
    with server.client() as http, http.stream("POST", route, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_completions_through_the_official_client(client: openai.OpenAI) -> None:
    """Text in, text out, usage and reason."""
    made = client.completions.create(model=MODEL, prompt="the quick brown fox", max_tokens=4, temperature=0)
    assert made.object == "text_completion" and made.model == MODEL
    assert made.choices[0].finish_reason == "length" and "the quick brown fox".startswith(made.choices[0].text)
    assert made.usage is not None and made.usage.completion_tokens == 4
    assert made.usage.total_tokens == made.usage.prompt_tokens + 4


def test_max_tokens_defaults(client: openai.OpenAI) -> None:
    """16 for completions, the remaining context for chat."""
    plain = client.completions.create(model=MODEL, prompt="the quick brown fox")
    assert plain.usage is not None and plain.usage.completion_tokens == 16
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert chat.usage is not None and chat.choices[0].finish_reason in ("length", "stop")
    if chat.choices[0].finish_reason == "length":
        assert chat.usage.total_tokens == LENGTH


def test_a_default_near_the_end_of_the_context_is_cut_but_a_wish_is_refused(client: openai.OpenAI) -> None:
    """16 was nobody's wish; max_tokens=16 is."""
    prompt = [7] * (LENGTH - 3)
    made = client.completions.create(model=MODEL, prompt=prompt)
    assert made.usage is not None and made.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="at most 3 can follow"):
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=16)


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    """Characters of several bytes come whole, and the pieces are the text."""
    prompt = "Größe, café, 你好世界, 🙂 and 👩‍👩‍👧 end"
    usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage
    assert usage is not None
    tokens = usage.prompt_tokens  # the fake engine says the prompt back
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens).choices[0].text
    pieces = [chunk.choices[0].text for chunk in
              client.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens, stream=True)]
    assert whole == prompt and "".join(pieces) == whole and len(pieces) > 3
    assert not [piece for piece in pieces[:-1] if not piece or "\ufffd" in piece]


def test_chat_stream_frames_are_openai_s(server: Server) -> None:
    """Role first, no empty text, the reason in a frame of its own, usage when asked for, [DONE] at the end."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "ignore_eos": True,
            "stream_options": {"include_usage": True}}
    found = frames(server, "/v1/chat/completions", body)
    assert found[-1] == "[DONE]"
    events = [json.loads(frame) for frame in found[:-1]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 5
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-2]["choices"][0]["delta"] == {} and events[-2]["choices"][0]["finish_reason"] == "length"
    assert all(event["choices"][0]["delta"]["content"] for event in events[1:-2])
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-2])


def test_completion_stream_frames(server: Server) -> None:
    """No usage unless asked for; exactly one frame has a reason."""
    found = frames(server, "/v1/completions", {"model": MODEL, "prompt": "the quick brown", "max_tokens": 5})
    events = [json.loads(frame) for frame in found[:-1]]
    assert found[-1] == "[DONE]" and all("usage" not in event for event in events)
    assert [event["choices"][0]["finish_reason"] for event in events].count("length") == 1
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_samples_keep_their_order(client: openai.OpenAI) -> None:
    """choice index = prompt * n + sample; ids and texts both work."""
    made = client.completions.create(model=MODEL, prompt=["alpha alpha", "beta beta"], n=2, max_tokens=3)
    texts = [choice.text for choice in made.choices]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0][0] == "a" and texts[2][0] == "b"
    ids = client.completions.create(model=MODEL, prompt=[[40, 41], [42]], max_tokens=2)
    assert len(ids.choices) == 2 and ids.usage is not None and ids.usage.prompt_tokens == 3


def test_n_streams_are_interleaved_and_whole(client: openai.OpenAI) -> None:
    """Each choice's pieces make the text that it has alone."""
    alone = client.completions.create(model=MODEL, prompt="once upon a time", max_tokens=8).choices[0].text
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model=MODEL, prompt="once upon a time", max_tokens=8, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert set(texts.values()) == {alone}


def test_stop_strings_end_the_text_and_the_work(server: Server, client: openai.OpenAI) -> None:
    """The stop string is not in the text, streamed or not; the engine is told."""
    for stream in (False, True):
        body: dict[str, Any] = {"model": MODEL, "prompt": "one two three four", "max_tokens": 99, "stop": ["thr", "z"]}
        if stream:
            text = "".join(c.choices[0].text for c in client.completions.create(**body, stream=True))
        else:
            made = client.completions.create(**body)
            text = made.choices[0].text
            assert made.choices[0].finish_reason == "stop"
            assert made.usage is not None and made.usage.completion_tokens < 30
        assert text == "one two "
    assert wait_until(lambda: server.gauge("tessera_requests_running") == 0, 3)


def test_stop_ids_and_the_eos_list(client: openai.OpenAI) -> None:
    """The model's eos ids stop unless ignored; stop_token_ids stop beside them."""
    for body, tokens in (({}, 3), ({"extra_body": {"ignore_eos": True}}, 5),
                         ({"extra_body": {"stop_token_ids": [41] * 1024}}, 2)):  # fmt: skip
        made = client.completions.create(model=MODEL, prompt=[40, 41, 1, 43, 44], max_tokens=5, **body)  # type: ignore[call-overload]
        assert made.usage.completion_tokens == tokens


def test_content_parts_and_roles(client: openai.OpenAI) -> None:
    """Text parts are joined by newlines; developer is system; a name is accepted."""
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    made = client.chat.completions.create(
        model=MODEL, max_tokens=40, extra_body={"ignore_eos": True},
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "x"}])  # type: ignore[list-item,misc]
    text = made.choices[0].message.content or ""
    assert made.choices[0].message.role == "assistant" and text.startswith("system\nbe brief\nuser\nfirst\nsecon")


def test_harmless_and_neutral_fields_are_accepted(server: Server) -> None:
    """Clients send defaults of fields that are not built; asking for what happens anyway is no error."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "user": "me", "metadata": {"a": "b"}, "store": False,
            "n": 1, "best_of": 1, "logprobs": None, "echo": False, "frequency_penalty": 0, "presence_penalty": 0.0,
            "logit_bias": {}, "suffix": None, "top_k": -1, "min_p": 0, "priority": -3, "stop": None, "seed": None,
            "stream": None, "stream_options": None, "repetition_penalty": 1.0}
    answer = server.client().post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x", "tool_calls": None}], "max_tokens": 1,
            "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False,
            "max_completion_tokens": 1, "parallel_tool_calls": True}
    assert server.client().post("/v1/chat/completions", json=chat).status_code == 200


def test_models(server: Server, client: openai.OpenAI) -> None:
    """Every served name is listed and found."""
    assert [model.id for model in client.models.list().data] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="served: tiny, alias"):
        client.models.retrieve("other/name")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_operations(server: Server) -> None:
    """Health, readiness, version, metrics: defined names, counts that move."""
    http = server.client()
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").json() == {"status": "ready"}
    assert "version" in http.get("/version").json()
    before = server.gauge("tessera_output_tokens_total")
    http.post("/v1/completions", json={"prompt": "hello there", "max_tokens": 9})
    assert server.gauge("tessera_output_tokens_total") == before + 9
    text = http.get("/metrics").text
    for name in ("ttft_seconds_count", "time_between_tokens_seconds_count", "queue_time_seconds_count",
                 "e2e_seconds_sum", "requests_running", "requests_waiting", "preemptions_total", "kv_pages_used",
                 "kv_pages_mapped",
                 'requests_total{outcome="length"}'):
        assert f"tessera_{name} " in text, name
    assert all(line.startswith(("tessera_", "# ")) for line in text.splitlines())


def test_text_routes(server: Server) -> None:
    """/tokenize and /detokenize invert each other."""
    http = server.client()
    text = "Größe 🙂 the quick"
    found = http.post("/tokenize", json={"prompt": text}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == LENGTH
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert "<|im_start|>user" in http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]


def test_nothing_else_is_served(server: Server) -> None:
    """No documentation, no files, no CORS; each refusal is OpenAI's error object."""
    http = server.client()
    for path in ("/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/", "/static/../etc/passwd", "/health/",
                 "/admin/drain", "/v1/embeddings"):
        answer = http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", path
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and "POST" in wrong.headers["allow"] and "POST" in wrong.json()["error"]["message"]
    preflight = http.options("/v1/completions", headers={"origin": "http://evil.example",
                                                         "access-control-request-method": "POST"})  # fmt: skip
    assert preflight.status_code == 405 and not [h for h in preflight.headers if h.startswith("access-control")]


def test_a_refusal_by_the_engine_is_a_400_even_for_a_stream(server: Server) -> None:
    """Headers wait for the engine's acceptance, so a stream can still be refused."""
    for stream in (False, True):
        answer = server.client().post("/v1/completions", json={"prompt": [REFUSE_ID], "stream": stream})
        assert answer.status_code == 400 and "pool is too small" in answer.json()["error"]["message"]


def test_a_fault_in_the_engine_ends_that_request_and_says_nothing_of_its_inside(server: Server) -> None:
    """500 once, the next request is fine, the text of the exception reaches neither client nor log."""
    for first in (RAISE_ID, STEP_RAISES_ID):
        answer = server.client().post("/v1/completions", json={"prompt": [first], "max_tokens": 3})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        assert server.client().post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert "secret" not in server.text()
    stream = frames(server, "/v1/completions", {"prompt": [STEP_RAISES_ID], "max_tokens": 3})
    assert json.loads(stream[-1])["error"]["type"] == "server_error"


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    """Streams, plain answers, n > 1, and twelve at once: the work ends at once, the others go on."""
    body = {"model": MODEL, "prompt": [40, 41], "max_tokens": LENGTH - 2, "ignore_eos": True, "n": 4}

    async def leave(http: httpx.AsyncClient, stream: bool) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(http.post("/v1/completions", json={**body, "stream": stream}), 0.3)

    async def storm() -> int:
        async with httpx.AsyncClient(base_url=server.base, trust_env=False) as http:
            short = {**body, "n": 1, "max_tokens": 80}
            stays = asyncio.create_task(http.post("/v1/completions", json=short, timeout=20))
            await asyncio.gather(*(leave(http, i % 2 == 0) for i in range(12)))
            assert await asyncio.to_thread(wait_until, lambda: server.gauge("tessera_requests_running") <= 1, 1.0)
            return len((await stays).json()["choices"][0]["text"])

    aborted = server.gauge('tessera_requests_total{outcome="abort"}')
    assert asyncio.run(storm()) > 0
    assert server.gauge('tessera_requests_total{outcome="abort"}') == aborted + 48


def test_a_hundred_at_once(server: Server) -> None:
    """Every answer is its own."""
    async def one(http: openai.AsyncOpenAI, i: int) -> None:
        made = await http.completions.create(model=MODEL, prompt=[ids[i], ids[i + 1]], max_tokens=4, stream=i % 2 == 0)
        if i % 2 == 0:
            text = "".join([chunk.choices[0].text async for chunk in made])  # type: ignore[union-attr]
        else:
            text = made.choices[0].text  # type: ignore[union-attr]
        assert text == truth[i]

    http = server.client()
    texts = ((i, http.post("/detokenize", json={"tokens": [i]}).json()["prompt"]) for i in range(260, 499))
    ids = [i for i, text in texts if "\ufffd" not in text]  # parts of characters would join the prompt's
    truth = [http.post("/detokenize", json={"tokens": ids[i : i + 2] * 2}).json()["prompt"] for i in range(100)]

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="x", max_retries=0, timeout=60) as client:
            await asyncio.gather(*(one(client, i) for i in range(100)))

    asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys of all three kinds."""
    tmp: Path = tmp_path_factory.mktemp("locked")
    keys = tmp / "keys"
    keys.write_text("first-key\nsecond-key\n")
    keys.chmod(0o600)
    flags = ["--model", str(tiny_folder(tmp / "model")), "--served-model-name", "tiny", "--api-key-file", str(keys)]
    with running(tmp, *flags, "--admin-key", "admin-key", "--metrics-key", "metrics-key") as found:
        yield found


class TestKeys:
    """Deny by default: every route but the literal list needs a key when there is one."""

    def test_every_route_but_the_open_ones_asks(self, locked: Server) -> None:
        """Also routes that do not exist: nobody learns what is there."""
        http = locked.client()
        for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/version",
                     "/v1/models/tiny", "/nothing", "/admin/drain", "/admin/kv-limit", "/health/", "/health%2f",
                     "/metrics"):
            for method in ("GET", "POST", "OPTIONS"):
                answer = http.request(method, path, json={"prompt": "x"})
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200
        for target in (b"//health", b"/health/../v1/models", b"/./health", b"/HEALTH", b"http://x/v1/models", b"*"):
            assert raw(locked.port, b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
                       ).startswith(b"HTTP/1.1 401"), target  # fmt: skip

    @pytest.mark.parametrize("value", ["first-key", "Basic first-key", "Bearer", "Bearer,first-key", "Bearer first-ke",
                                       "Bearer x", "Bearer first-key2", "Bearer first-key second-key",
                                       "Bearer admin-key",
                                       "Bearer metrics-key", "Bearer FIRST-KEY"])  # fmt: skip
    def test_wrong_keys(self, locked: Server, value: str) -> None:
        """Close is not equal, and another route's key is wrong here."""
        assert locked.client().get("/v1/models", headers={"authorization": value}).status_code == 401

    @pytest.mark.parametrize("value", ["Bearer first-key", "bearer second-key", "BEARER  second-key"])
    def test_right_keys(self, locked: Server, value: str) -> None:
        """Any key of the file, the scheme in any case."""
        assert locked.client().get("/v1/models", headers={"authorization": value}).status_code == 200

    def test_two_headers_are_no_key(self, locked: Server) -> None:
        """Nobody may guess which of two a proxy has checked."""
        headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")]
        assert locked.client().get("/v1/models", headers=headers).status_code == 401

    def test_metrics_and_admin_have_their_own(self, locked: Server) -> None:
        """And the API key does not open them."""
        http = locked.client()
        for path, method, key in (("/metrics", "GET", "metrics-key"), ("/admin/drain", "POST", "admin-key")):
            assert http.request(method, path, headers={"authorization": "Bearer first-key"}).status_code == 401
            if path == "/metrics":
                assert http.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code == 200

    def test_the_key_comes_before_the_body(self, locked: Server) -> None:
        """A stranger's body is not read: the answer is there while it is still being sent."""
        def slow_body() -> Iterator[bytes]:
            yield b"{"
            raise AssertionError("the server asked for more of the body")

        with pytest.raises((AssertionError, httpx.HTTPError)):
            locked.client().post("/v1/completions", content=slow_body())
        answer = locked.client().post("/v1/completions", content=b"x" * (9 << 20))
        assert answer.status_code == 401

    def test_keys_are_nowhere_in_the_log(self, locked: Server) -> None:
        """Neither ours nor what a stranger tried."""
        locked.client().get("/v1/models", headers={"authorization": "Bearer tried-this-key"})
        assert not [word for word in ("first-key", "second-key", "admin-key", "tried-this") if word in locked.text()]

    def test_the_kv_limit_is_an_admin_s(self, locked: Server) -> None:
        """Groups, or bytes rounded down to groups; what is out of range is a 400, what live requests forbid a 409."""
        http = locked.client(headers={"authorization": "Bearer admin-key"})
        assert http.post("/admin/kv-limit", json={"groups": 7}).json() == {
            "groups": 7, "bytes": 7 * 8192, "in_use_groups": 0}  # fmt: skip
        assert http.post("/admin/kv-limit", json={"bytes": 5 * 8192 + 1}).json()["groups"] == 5
        for body in ({"groups": 65}, {"groups": -1}, {"groups": 1.0}, {"groups": True}, {"bytes": "1GiB"}, {}, {"x": 1},
                     {"groups": 1, "bytes": 1}, {"groups": 1 << 49}):  # fmt: skip
            answer = http.post("/admin/kv-limit", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["message"], body
        ask = {"prompt": [5, 6, 7], "max_tokens": 200, "stream": True, "ignore_eos": True}
        api = locked.client(headers={"authorization": "Bearer first-key"})
        with api.stream("POST", "/v1/completions", json=ask) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            answer = http.post("/admin/kv-limit", json={"groups": 0})
            assert answer.status_code == 409 and answer.json()["error"]["code"] == "conflict"

    def test_admin_drain_is_sigterm(self, locked: Server) -> None:
        """The last test of this server: it ends with status 0."""
        answer = locked.client().post("/admin/drain", headers={"authorization": "Bearer admin-key"})
        assert answer.status_code == 200 and locked.process.wait(10) == 0
