"""Hostile input, case by case: each gets its 4xx with OpenAI's error object, at once, and the server is as it was.

Never a 500, never a hang, never a value that was silently taken for another. The cases are a table so that adding one
is a line.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.serve import schema
from engine.serve.errors import ApiError
from engine.serve.ids import Limits
from engine.serve.strict_json import parse_object
from tests.serve.fake_engine import LENGTH, VOCAB
from tests.serve.harness import Server, raw, running, tiny_folder

C, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**40
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that must survive them all; its log must stay silent about them."""
    tmp = tmp_path_factory.mktemp("hostile")
    with running(tmp, "--model", str(tiny_folder(tmp / "model")), "--served-model-name", "tiny") as found:
        yield found
        assert found.process.poll() is None
        with found.client() as http:
            assert http.post(C, json={"prompt": "x", "max_tokens": 1}).status_code == 200
        assert "Traceback" not in found.text() and found.gauge("tessera_request_failures_total") == 0


def check(answer: httpx.Response, status: int, words: str = "", param: str | None = None) -> None:
    """An OpenAI error object with this status, these words, this field."""
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] and error["code"]
    assert words in error["message"], error["message"]
    assert len(error["message"]) < 600
    if param is not None:
        assert error["param"] == param


FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    # route, body (a completion's prompt is added), param, words
    (C, {"max_tokens": 0}, "max_tokens", "1.."),
    (C, {"max_tokens": -1}, "max_tokens", "-1"),
    (C, {"max_tokens": HUGE}, "max_tokens", "integer of more than 70 bits"),
    (C, {"max_tokens": 2**63}, "max_tokens", "9223372036854775808"),
    (C, {"max_tokens": 1.5}, "max_tokens", "1.5"),
    (C, {"max_tokens": True}, "max_tokens", "True"),
    (C, {"max_tokens": "16"}, "max_tokens", '"16"'),
    (C, {"max_tokens": LENGTH + 1}, "max_tokens", str(LENGTH)),
    (C, {"max_tokens": LENGTH}, "max_tokens", "can follow"),
    (C, {"temperature": -0.1}, "temperature", "-0.1"),
    (C, {"temperature": 1e308}, "temperature", "100"),
    (C, {"temperature": "hot"}, "temperature", "hot"),
    (C, {"temperature": True}, "temperature", "True"),
    (C, {"temperature": [1]}, "temperature", "a list of 1"),
    (C, {"top_p": 0}, "top_p", "(0"),
    (C, {"top_p": 1.01}, "top_p", "1.01"),
    (C, {"top_k": -2}, "top_k", "-2"),
    (C, {"top_k": 2.0}, "top_k", "2.0"),
    (C, {"top_k": 2**40}, "top_k", str(2**40)),
    (C, {"min_p": -1}, "min_p", "-1"),
    (C, {"n": 0}, "n", "1..128"),
    (C, {"n": 129}, "n", "1..128"),
    (C, {"n": HUGE}, "n", "integer of more than"),
    (C, {"n": 128, "prompt": ["a"] * 9}, "n", "1152 samples"),
    (C, {"n": False}, "n", "False"),
    (C, {"seed": 2**64}, "seed", str(2**64)),
    (C, {"seed": -(2**63) - 1}, "seed", "-922"),
    (C, {"seed": 0.5}, "seed", "0.5"),
    (C, {"min_tokens": -1}, "min_tokens", "-1"),
    (C, {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "above"),
    (C, {"min_tokens": LENGTH}, "min_tokens", "above"),
    (C, {"ignore_eos": 1}, "ignore_eos", "1"),
    (C, {"stop": 3}, "stop", "3"),
    (C, {"stop": [""]}, "stop", "1..1024"),
    (C, {"stop": ["a"] * 17}, "stop", "16"),
    (C, {"stop": ["a" * 1025]}, "stop", "1024"),
    (C, {"stop": ["a", 1]}, "stop", "string"),
    (C, {"stop": {"a": 1}}, "stop", "an object of 1"),
    (C, {"stop_token_ids": [VOCAB]}, "stop_token_ids", f"0..{VOCAB - 1}"),
    (C, {"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    (C, {"stop_token_ids": [True]}, "stop_token_ids", "true"),
    (C, {"stop_token_ids": 3}, "stop_token_ids", "3"),
    (C, {"stop_token_ids": [5] * 1025}, "stop_token_ids", "at most 1024"),
    (C, {"stream": "yes"}, "stream", "yes"),
    (C, {"stream": 1}, "stream", "1"),
    (C, {"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    (C, {"stream": True, "stream_options": []}, "stream_options", "a list of 0"),
    (C, {"stream": True, "stream_options": {"usage": 1}}, "stream_options", "usage"),
    (C, {"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "1"),
    (C, {"priority": 2**40}, "priority", str(2**40)),
    (C, {"priority": True}, "priority", "true"),
    (C, {"prompt": None}, "prompt", "null"),
    (C, {"prompt": ""}, "prompt", "empty"),
    (C, {"prompt": []}, "prompt", "a list of 0"),
    (C, {"prompt": [[]]}, "prompt", "empty"),
    (C, {"prompt": ["a", ""]}, "prompt", "empty"),
    (C, {"prompt": ["a", [1]]}, "prompt", "mixes"),
    (C, {"prompt": [1, "a"]}, "prompt", '"a"'),
    (C, {"prompt": [[1], [2.0]]}, "prompt", "2.0"),
    (C, {"prompt": 7}, "prompt", "7"),
    (C, {"prompt": {"text": "x"}}, "prompt", "an object"),
    (C, {"prompt": [VOCAB]}, "prompt", str(VOCAB)),
    (C, {"prompt": [-1]}, "prompt", "-1"),
    (C, {"prompt": [2**32 + 5]}, "prompt", str(2**32 + 5)),
    (C, {"prompt": [2**64 + 5]}, "prompt", str(2**64 + 5)),
    (C, {"prompt": [HUGE]}, "prompt", "more than 70 bits"),
    (C, {"prompt": [True]}, "prompt", "true"),
    (C, {"prompt": [1, False, 2]}, "prompt", "false"),
    (C, {"prompt": [None]}, "prompt", "null"),
    (C, {"prompt": [[[1]]]}, "prompt", "a list of 1"),
    (C, {"prompt": [5] * (LENGTH + 1)}, "prompt", str(LENGTH + 1)),
    (C, {"prompt": [5] * LENGTH}, "prompt", "no token can follow"),
    (C, {"prompt": ["a"] * 1025}, "prompt", "1024"),
    (C, {"prompt": "word " * 2000}, "prompt", str(LENGTH)),
    (C, {"prompt": "x" * 3_000_000}, "prompt", "3000000 bytes"),
    (C, {"echo": 1}, "echo", "true or false"),
    (C, {"echo": True, "logprobs": 0}, "echo", "prompt's tokens"),
    (C, {"logprobs": 21}, "logprobs", "0..20"),
    (C, {"logprobs": True}, "logprobs", "true"),
    (C, {"logprobs": -1}, "logprobs", "-1"),
    (C, {"logprobs": 20, "max_tokens": 200, "n": 128, "prompt": ["a"] * 8}, "max_tokens", "logprobs each"),
    (C, {"bad_words": ["x"]}, "bad_words", "many sequences"),
    (C, {"token_space": "patched"}, "token_space", "base, engine"),
    (C, {"token_space": 5}, "token_space", "5"),
    (C, {"best_of": 2}, "best_of", "not supported"),
    (C, {"suffix": "end"}, "suffix", "not supported"),
    (C, {"logit_bias": {"5": 101}}, "logit_bias", "101"),
    (C, {"logit_bias": {"5": True}}, "logit_bias", "True"),
    (C, {"logit_bias": {"5": 10**400}}, "logit_bias", "more than 128 bits"),
    (C, {"logit_bias": {"5": -(10**400)}}, "logit_bias", "more than 128 bits"),
    (C, {"logit_bias": {"512": 1}}, "logit_bias", "512"),
    (C, {"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    (C, {"logit_bias": {"05": 1}}, "logit_bias", "05"),
    (C, {"logit_bias": {"٣": 1}}, "logit_bias", "not a token id"),
    (C, {"logit_bias": [5]}, "logit_bias", "a list of 1"),
    (C, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    (C, {"presence_penalty": 0.5}, "presence_penalty", "0.5"),
    (C, {"frequency_penalty": -2}, "frequency_penalty", "-2"),
    (C, {"repetition_penalty": 1.1}, "repetition_penalty", "1.1"),
    (C, {"prompt_embeds": "AAAA"}, "prompt_embeds", "not supported"),
    (C, {"guided_regex": "(a+)+$"}, "guided_regex", "not supported"),
    (C, {"max_token": 5}, "max_token", "unknown"),
    (C, {"__proto__": 1}, "__proto__", "unknown"),
    (C, {"": 1}, "", "unknown"),
    (C, {"model": 5}, "model", "5"),
    (C, {"model": "x" * 300}, "model", "256"),
    (CHAT, {"messages": None}, "messages", "null"),
    (CHAT, {"messages": []}, "messages", "a list of 0"),
    (CHAT, {"messages": "hi"}, "messages", "hi"),
    (CHAT, {"messages": [3]}, "messages", "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages", "role"),
    (CHAT, {"messages": [{"role": "root", "content": "x"}]}, "messages", "root"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool"),
    (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages", "a list of 1"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages", "content=null"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "5"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages", "a list of 0"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages", "image_url"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "exactly type and text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages", "must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages", "weight"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages", "tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages", "name"),
    (CHAT, {"messages": USER * 4097}, "messages", "4096"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]}, "messages", str(LENGTH)),
    (CHAT, {"messages": USER, "prompt": "x"}, "prompt", "unknown"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "required"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
     "response_format", "not supported"),
    (CHAT, {"messages": USER, "logprobs": 3}, "logprobs", "true or false"),
    (CHAT, {"messages": USER, "top_logprobs": 5}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "0..20"),
    (CHAT, {"messages": USER, "echo": True}, "echo", "not supported"),
    (CHAT, {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "not supported"),
    (CHAT, {"messages": USER, "modalities": ["audio"]}, "modalities", "not supported"),
    (CHAT, {"messages": USER, "max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens", "contradicts"),
    (CHAT, {"messages": USER, "max_completion_tokens": True}, "max_tokens", "True"),
    ("/tokenize", {"prompt": 5}, "prompt", "one text"),
    ("/tokenize", {"prompt": "x", "messages": USER}, "prompt", "one of"),
    ("/tokenize", {"prompt": "x", "extra": 1}, "extra", "the fields are"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
    ("/detokenize", {"tokens": [VOCAB]}, "tokens", str(VOCAB)),
    ("/detokenize", {"tokens": [True]}, "tokens", "true"),
    ("/detokenize", {"tokens": "x"}, "tokens", "the fields are"),
]


@pytest.mark.parametrize(("route", "body", "param", "words"), FIELDS,
                         ids=[f"{i}-{param}" for i, (_, _, param, _) in enumerate(FIELDS)])
def test_a_wrong_field_is_named_with_value_and_limit(server: Server, route: str, body: dict[str, Any], param: str,
                                                     words: str) -> None:
    """400, the field in `param`, value or limit in the message."""
    full = {"prompt": "hello", **body} if route == C else body
    begin_s = time.monotonic()
    check(server.client().post(route, json=full), 400, words, param)
    assert time.monotonic() - begin_s < 5


BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"null", "null"),
    (b"[]", "a list of 0"),
    (b'"x"', '"x"'),
    (b"{", "not valid JSON"),
    (b'{"prompt":"x",}', "not valid JSON"),
    (b'{"prompt":"x"} {}', "trailing"),
    (b"{'prompt':'x'}", "not valid JSON"),
    (b'{"prompt":"x","temperature":NaN}', "not valid JSON"),
    (b'{"prompt":"x","temperature":Infinity}', "not valid JSON"),
    (b'{"prompt":"x","temperature":-Infinity}', "not valid JSON"),
    (b'{"prompt":"x","temperature":1e999}', "out of range"),
    (b'{"prompt":"x","max_tokens":' + b"9" * 5000 + b"}", "out of range"),
    (b'{"prompt":"\xff\xfe"}', "UTF-8"),
    (b'{"prompt":"\\ud800 lone"}', "not valid JSON"),
    (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b"\x00\x01\x02", "not valid JSON"),
    (b"[" * 100_000, "100000 lists"),
    (b"[" * 60_000, "nested deeper"),
    (b'{"a":' * 30_000, "nested deeper"),
    (b'{"prompt":' + b"[" * 65 + b"1" + b"]" * 65 + b"}", "nested deeper"),
    (b'{"prompt":' + b"[" * 900 + b"1" + b"]" * 900 + b"}", "nested deeper"),
    (b"{" + b",".join(b'"k%d":{}' % i for i in range(40_000)) + b"}", "40000 keys; at most 32768"),
    (b'{"prompt":[' + b",".join([b"[1]"] * 70_000) + b"]}", "70002 lists"),
    (b'{"prompt":[' + b"1," * 1_300_000 + b"1]}", "1300000 members"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[f"{i}-{words}" for i, (_, words) in enumerate(BODIES)])
def test_a_body_that_is_not_strict_json_is_refused(server: Server, body: bytes, words: str) -> None:
    """Before anything looks at fields."""
    answer = server.client().post(C, content=body, headers={"content-type": "application/json"})
    check(answer, 400, words)


KINDS = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx",
         "application/xml", "text/json\u00e9"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_json_is_read(server: Server, kind: str) -> None:
    """A web page of another origin cannot send application/json without asking first."""
    headers = {"content-type": kind.encode("latin-1")} if kind else {}
    check(server.client().post(C, content=b'{"prompt":"x"}', headers=headers), 415, "application/json")  # type: ignore[arg-type]


def test_compressed_bodies_are_refused(server: Server) -> None:
    """A bomb is never unpacked."""
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    check(server.client().post(C, content=b"\x1f\x8b", headers=headers), 415, "compressed")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(server: Server, chunked: bool) -> None:
    """By its declared size before it is read, and by its real size while it is."""
    big = b'{"prompt":"' + b"x" * (9 << 20) + b'"}'
    content: Any = (big[i : i + 65536] for i in range(0, len(big), 65536)) if chunked else big
    check(server.client().post(C, content=content, headers={"content-type": "application/json"}), 413, str(8 << 20))


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
RAW: list[tuple[str, bytes, bytes]] = [
    ("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3 + b"\r\n\r\n", b"400"),
    ("no version", b"GET /\r\n\r\n", b"400"),
    ("space in target", b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n", b"400"),
    ("no host", b"GET /health HTTP/1.1\r\n\r\n", b"400"),
    ("bad length", HEAD + b"content-length: -5\r\n\r\n", b"400"),
    ("two lengths", HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}   ", b"400"),
    ("length and chunked", HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    ("unknown coding", HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"501"),
    ("bad chunk size", HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ("huge chunk size", HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n", b"400"),
    ("folded header", b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n\tc\r\nbad header\r\n\r\n", b"400"),
    ("NUL in a header", b"GET /health HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n", b"400"),
    ("long header", b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 1_000_000 + b"\r\n\r\n", b"431"),
    ("long target", b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"431"),
    ("many headers", b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n", b"431"),
    ("10^5 headers", b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100_000 + b"\r\n", b"431"),
    ("tiny chunks", HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n", b"413"),
]


@pytest.mark.parametrize(("data", "status"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_what_is_not_http_gets_an_answer_and_a_closed_connection(server: Server, data: bytes, status: bytes) -> None:
    """Bounded work, an error object, the connection closed, and the next client is served."""
    begin_s = time.monotonic()
    answer = raw(server.port, data, seconds=6)
    assert time.monotonic() - begin_s < 5, "the server kept the connection"
    allowed = (status, b"400") if status == b"501" else (status,)
    assert answer.startswith(tuple(b"HTTP/1.1 " + code for code in allowed)), answer[:200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower() and set(json.loads(body)["error"]) >= {"message", "type", "code"}
    assert server.client().get("/health").status_code == 200


def test_a_header_flood_does_not_fill_memory(server: Server) -> None:
    """A 100 MB header is cut off at the limit, not buffered."""
    rss = _rss(server)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\na: ")
        with contextlib.suppress(OSError):  # cut off in the middle, as it should be
            for _ in range(1600):
                connection.sendall(b"x" * 65536)
    assert _rss(server) - rss < 32 << 20 and server.client().get("/health").status_code == 200


def _rss(server: Server) -> int:
    with open(f"/proc/{server.process.pid}/statm", encoding="ascii") as lines:
        return int(lines.read().split()[1]) * 4096


def test_slow_headers_and_pipelining(server: Server) -> None:
    """A request after a request on one connection works; a header byte by byte is still one request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        for byte in b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n":
            connection.sendall(bytes([byte]))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        got = b""
        while got.count(b"HTTP/1.1 200") < 3:
            got += connection.recv(4096)


@pytest.mark.slow
def test_half_a_header_and_half_a_body_are_closed(server: Server) -> None:
    """10 s for a header, 30 s of silence in a body; both with an answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as header, \
            socket.create_connection(("127.0.0.1", server.port), timeout=60) as body, \
            socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:  # fmt: skip
        begin_s = time.monotonic()
        header.sendall(b"GET /health HTTP/1.1\r\nho")
        body.sendall(HEAD + b"content-length: 100\r\n\r\n{")
        assert header.recv(4096).startswith(b"HTTP/1.1 408") and 9 < time.monotonic() - begin_s < 15
        assert silent.recv(4096) == b"" and time.monotonic() - begin_s < 16
        assert body.recv(4096).startswith(b"HTTP/1.1 408") and 29 < time.monotonic() - begin_s < 40


def test_twenty_hostile_clients_do_not_delay_the_others(server: Server) -> None:
    """/health answers at once while large prompts are refused (the event loop encodes nothing)."""
    text = "x" * 3_000_000
    worst_s = 0.0
    with server.client() as http, server.client() as pinger:
        for _ in range(5):
            check(http.post(C, json={"prompt": text}), 400, "bytes")
            begin_s = time.monotonic()
            assert pinger.get("/health").status_code == 200
            worst_s = max(worst_s, time.monotonic() - begin_s)
    assert worst_s < 1.0  # ample: other tests share the machine


LIMITS = Limits(("tiny",), LENGTH, VOCAB, {"temperature": 0.7})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
NAMES = [*schema.SAMPLING, *schema.NEUTRAL, *schema.HARMLESS, "prompt", "messages", "max_tokens", "stop", "stream",
         "stream_options", "stop_token_ids", "logit_bias", "logprobs", "token_space", "priority", "model",
         "max_completion_tokens", "other"]


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), st.booleans())
def test_whatever_a_body_holds_it_is_an_ask_or_a_4xx(body: dict[str, Any], chat: bool) -> None:
    """The parser never raises anything else, and what it accepts is inside the limits."""
    if chat:
        body.setdefault("messages", USER)
    else:
        body.setdefault("prompt", "x")
    try:
        ask = (schema.parse_chat if chat else schema.parse_completion)(body, LIMITS)
    except ApiError as error:
        assert 400 <= error.status < 500 and error.message and error.encoded()
        return
    assert 1 <= ask.params.n <= 128 and 0 <= ask.params.temperature <= 100 and ask.model == "tiny"
    assert ask.params.max_tokens is None or 1 <= ask.params.max_tokens <= LENGTH


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u', max_size=60).map(str.encode))
def test_whatever_bytes_come_they_are_an_object_or_a_400(body: bytes) -> None:
    """Never another exception."""
    try:
        assert isinstance(parse_object(body), dict)
    except ApiError as error:
        assert error.status == 400
