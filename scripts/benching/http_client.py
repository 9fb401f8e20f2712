"""A streaming client with honest times: each request leaves at its arrival, each event is noted as it comes.

Plain asyncio, so that the client costs little beside the server. It knows OpenAI's stream of completions and nothing
else; an answer that is not whole is an error.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from engine.core.clock import MonotonicClock
from scripts.benching.drive import NotProduced
from scripts.benching.metrics import Timeline
from scripts.benching.workloads import Workload

MAX_LINE_BYTES = 1 << 20


def first_model(base: str) -> str:
    """The name of the first model that a server offers. Raises NotProduced."""
    try:
        with urllib.request.urlopen(f"{base}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise NotProduced(f"{base}/v1/models: {error}") from None


async def run(base: str, model: str, workload: Workload, prompts: Sequence[list[int]]) -> list[Timeline]:
    """Every request on a connection of its own. Times count from now; num_tokens is what the server says it made.

    Raises NotProduced when a request fails or makes another number of tokens.
    """
    clock = MonotonicClock()
    start_s = clock.now_s()
    timelines = [Timeline(item.arrival_s, item.prompt_tokens) for item in workload.items]

    async def one(index: int) -> None:
        item, timeline = workload.items[index], timelines[index]
        await asyncio.sleep(max(0.0, start_s + item.arrival_s - clock.now_s()))
        body = {"model": model, "prompt": prompts[index], "max_tokens": item.output_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        async for event in _events(base, body):
            if event.get("error"):
                raise NotProduced(f"{workload.name}: request {index}: {str(event['error'])[:300]}")
            if any(choice.get("text") for choice in event.get("choices", ())):
                timeline.token_s.append(clock.now_s() - start_s)
            if event.get("usage"):
                timeline.num_tokens = int(event["usage"]["completion_tokens"])
        if timeline.num_tokens != item.output_tokens or not timeline.token_s:
            raise NotProduced(f"{workload.name}: request {index} made {timeline.num_tokens} tokens of "
                              f"{item.output_tokens} in {len(timeline.token_s)} events")

    async with asyncio.TaskGroup() as group:
        for index in range(len(workload.items)):
            group.create_task(one(index))
    return timelines


async def _events(base: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream, until [DONE]."""
    address = urlsplit(base)
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80, limit=MAX_LINE_BYTES)
    try:
        data = json.dumps(body).encode()
        head = (f"POST {address.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n")
        writer.write(head.encode() + data)
        await writer.drain()
        status = (await reader.readline()).decode("latin-1").split(" ", 2)
        chunked = False
        while (line := (await reader.readline()).strip().lower()) != b"":
            chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
        if len(status) < 2 or status[1] != "200":
            raise NotProduced(f"{base} answered {' '.join(status).strip()}: {(await reader.read(300))!r}")
        async for line in _lines(reader, chunked):
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
        raise NotProduced(f"{base}: a stream ended without [DONE]")
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Lines of a body, whatever its chunks."""
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            data = (await reader.readexactly(size + 2))[:-2] if size else b""
        else:
            data = await reader.read(1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
