"""Many clients at once, some leaving mid-way: is every answer right, and is everything given back?

`python -m scripts.soak` starts a server, asks every prompt alone (the truth, temperature 0), then all of them at once
through the official client, chat and completions, streamed and not, while a part of the clients disconnects. Every
finished answer must equal the truth; afterwards slots, pages, mappings and file descriptors, counted from /proc and
/metrics, must be what they were before. Exit status 1 when something is not; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

SUBJECTS = ("a lighthouse", "the French Revolution", "sourdough bread", "prime numbers", "a lost dog", "tides", "Rust")
VERBS = ("Explain", "Write a short story about", "List three facts about", "Ask a question about", "Summarise")


@dataclass(frozen=True)
class Ask:
    """One prompt, and how it is sent."""

    text: str
    chat: bool
    stream: bool
    max_tokens: int


@dataclass(frozen=True)
class Snapshot:
    """What a server holds. Files and mappings are of all its processes; the rest is from /metrics."""

    files: int
    mappings: int
    slab_mappings: int
    gauges: dict[str, float]


def make_asks(count: int, seed: int) -> list[Ask]:
    """Different prompts of different lengths, half chat, half streamed."""
    rng = random.Random(seed)
    asks = []
    for i in range(count):
        text = f"{rng.choice(VERBS)} {rng.choice(SUBJECTS)} (number {i})." + " Be brief." * rng.randrange(30)
        asks.append(Ask(text, chat=i % 2 == 0, stream=i % 4 < 2, max_tokens=rng.randrange(8, 65)))
    return asks


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parent: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            parent[int(folder.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, of in parent.items() if of == member]
    return found


def snapshot(pid: int, base: str) -> Snapshot:
    """Count what the server and its children hold now."""
    files = mappings = slabs = 0
    for member in family(pid):
        files += len(list(Path(f"/proc/{member}/fd").iterdir()))
        maps = Path(f"/proc/{member}/maps").read_text().splitlines()
        mappings += len(maps)
        slabs += sum("memfd:" in line for line in maps)
    text = urllib.request.urlopen(f"{base}/metrics", timeout=10).read().decode()
    wanted = re.compile(r"^(tessera_\w*(?:running|waiting|kv_\w+|slots\w*))(?:{[^}]*})? ([-+.e0-9]+)$", re.M)
    return Snapshot(files, mappings, slabs, {name: float(value) for name, value in wanted.findall(text)})


async def answer(client: openai.AsyncOpenAI, model: str, ask: Ask, leave_after: int | None = None) -> str | None:
    """The whole text, or None when this client left after `leave_after` frames (or before any answer, if 0)."""
    body: dict[str, Any] = {"model": model, "max_tokens": ask.max_tokens, "temperature": 0.0}
    if ask.chat:
        body["messages"] = [{"role": "user", "content": ask.text}]
        create: Any = client.chat.completions.create
    else:
        body["prompt"] = ask.text
        create = client.completions.create
    if not ask.stream:
        call = create(**body)
        if leave_after is not None:
            try:
                await asyncio.wait_for(call, 0.01 * leave_after)
            except (TimeoutError, openai.APIError):
                return None
            return None
        choice = (await call).choices[0]
        return str(choice.message.content if ask.chat else choice.text)
    pieces: list[str] = []
    stream = await create(stream=True, **body)
    async for frame in stream:
        if leave_after is not None and len(pieces) >= leave_after:
            await stream.close()
            return None
        for choice in frame.choices:
            pieces.append((choice.delta.content if ask.chat else choice.text) or "")
    return "".join(pieces)


async def storm(base: str, model: str, asks: list[Ask], leave: float, seed: int) -> tuple[list[str | None], list[str]]:
    """(what each client got, the truth)."""
    rng = random.Random(seed)
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=600) as client:
        truth = [str(await answer(client, model, ask)) for ask in asks]
        leaving = [rng.randrange(12) if rng.random() < leave else None for _ in asks]
        got = await asyncio.gather(*(answer(client, model, ask, when) for ask, when in zip(asks, leaving, strict=True)))
    return list(got), truth


def start_server(args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str, str]:
    """(process, base address, served model name) of a ready server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "engine.api_server", "--port", str(port), "--dtype", args.dtype]
    command += ["--kv-release-after", "0.5", *(["--model", args.model] if args.model else []), *args.flags]
    server = subprocess.Popen(command)
    base = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            urllib.request.urlopen(f"{base}/ready", timeout=1).read()
            break
        except OSError:
            time.sleep(0.1)
    models = json.load(urllib.request.urlopen(f"{base}/v1/models", timeout=10))
    return server, base, str(models["data"][0]["id"])


def main() -> None:
    """Start, warm up, count, storm, count again."""
    parser = argparse.ArgumentParser(prog="scripts.soak", description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--disconnect", type=float, default=0.3, help="part of the clients that leave early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="more server flags, after --")
    args = parser.parse_args()
    server, base, model = start_server(args)
    try:
        asks = make_asks(args.requests, args.seed)
        asyncio.run(storm(base, model, asks[:8], 0.5, args.seed))  # pools and caches reach their usual size
        time.sleep(3)
        before = snapshot(server.pid, base)
        got, truth = asyncio.run(storm(base, model, asks, args.disconnect, args.seed + 1))
        time.sleep(3)
        after = snapshot(server.pid, base)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    finished = [(text, true) for text, true in zip(got, truth, strict=True) if text is not None]
    differ = sum(text != true for text, true in finished)
    held = {
        name: [getattr(before, name), getattr(after, name)]
        for name in ("files", "slab_mappings", "gauges")
        if getattr(before, name) != getattr(after, name)
    }
    result = {
        "dtype": args.dtype,
        "requests": len(asks),
        "left_early": len(asks) - len(finished),
        "finished": len(finished),
        "differ": differ,
        "before": vars(before),
        "after": vars(after),
        "not_given_back": held,
        "exit_status_after_sigterm": server.returncode,
    }
    print(json.dumps(result))
    raise SystemExit(1 if differ or held or server.returncode else 0)


if __name__ == "__main__":
    main()
