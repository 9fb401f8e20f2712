"""Text workers: a template or text that takes too long is killed, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine.serve import text_pool, wire
from engine.serve.errors import ApiError
from engine.serve.text_pool import TextPool
from tests.serve.harness import children, command_of, tiny_folder, wait_until

ENDLESS = ("{% for m in messages %}{% if m['content'] == 'stop' %}{% for a in range(90000) %}"
           "{% for b in range(90000) %}"
           "{% endfor %}{% endfor %}{% endif %}{{ m['content'] }}{% endfor %}")
HUGE = "{% for m in messages %}{% for a in range(60000) %}{{ m['content'] }}{% endfor %}{% endfor %}"
RAISES = "{{ raise_exception('roles must alternate') }}"
LENGTH = 64


def with_pool(folder: Path, job: Callable[[TextPool], Awaitable[None]], size: int = 1) -> None:
    """Run a job with a pool of its own."""
    async def run() -> None:
        pool = TextPool(str(folder), size)
        try:
            await pool.start()
            await job(pool)
        finally:
            await pool.close()

    asyncio.run(run())


def ask(text: str) -> list[dict[str, str]]:
    """One user message."""
    return [{"role": "user", "content": text}]


def test_an_endless_template_is_killed_and_the_pool_goes_on(tmp_path: Path) -> None:
    """One request gets its 400 after the deadline; the one behind it gets its answer from a new worker."""
    async def job(pool: TextPool) -> None:
        begin_s = time.monotonic()
        slow = asyncio.create_task(pool.render(ask("stop"), max_tokens=LENGTH))
        await asyncio.sleep(0.05)
        behind = asyncio.create_task(pool.render(ask("go"), max_tokens=LENGTH))
        with pytest.raises(ApiError, match="took longer than 1.0 s") as caught:
            await slow
        assert caught.value.status == 400 and time.monotonic() - begin_s < 5
        assert await behind and pool.restarts == 1
        assert len([pid for pid in children_of_pool() if command_of(pid)]) == 1

    with_pool(tiny_folder(tmp_path / "model", ENDLESS), job)


def children_of_pool() -> list[int]:
    """Text workers of this process that are alive."""
    return [pid for pid in children(os.getpid()) if "text_worker" in command_of(pid)]


def test_a_template_s_output_is_bounded(tmp_path: Path) -> None:
    """What cannot fit the context is refused by its bytes, before it is encoded."""
    async def job(pool: TextPool) -> None:
        with pytest.raises(ApiError, match="bytes; the model's context holds"):
            await pool.render(ask("word"), max_tokens=LENGTH)

    with_pool(tiny_folder(tmp_path / "model", HUGE), job)


def test_a_template_may_refuse(tmp_path: Path) -> None:
    """raise_exception is the template's word to the client: 400, and the worker lives."""
    async def job(pool: TextPool) -> None:
        with pytest.raises(ApiError) as caught:
            await pool.render(ask("x"), max_tokens=LENGTH)
        assert caught.value.status == 400 and pool.restarts == 0
        assert await pool.encode("hello", add_special_tokens=True, max_tokens=LENGTH)

    with_pool(tiny_folder(tmp_path / "model", RAISES), job)


def test_bytes_first_then_tokens(tmp_path: Path) -> None:
    """Text that cannot fit never reaches a worker; text that might is counted there."""
    async def job(pool: TextPool) -> None:
        limit = pool.longest_text_bytes(LENGTH)
        assert limit >= LENGTH * 2
        with pytest.raises(ApiError, match=f"no text of {LENGTH} tokens"):
            await pool.encode("x" * (limit + 1), add_special_tokens=True, max_tokens=LENGTH)
        with pytest.raises(ApiError, match=f"has {LENGTH + 1} tokens"):
            await pool.encode("\n" * (LENGTH + 1), add_special_tokens=False, max_tokens=LENGTH)
        assert (await pool.encode("\n" * LENGTH, add_special_tokens=False, max_tokens=LENGTH)).count == LENGTH
        done = await pool.encode("a 🙂 b", add_special_tokens=False, max_tokens=LENGTH)
        assert await pool.decode(done.tokens) == "a 🙂 b"

    with_pool(tiny_folder(tmp_path / "model"), job)


def test_a_killed_worker_costs_its_own_job_only(tmp_path: Path) -> None:
    """kill -9 between jobs or in one: a 400 at most once, then a new worker; many at once are all answered."""
    async def job(pool: TextPool) -> None:
        for worker in list(pool._all):
            worker.process.kill()
        results = await asyncio.gather(
            *(pool.encode(f"text {i}", add_special_tokens=False, max_tokens=LENGTH) for i in range(20)),
            return_exceptions=True)
        failed = [result for result in results if isinstance(result, ApiError)]
        assert len(failed) <= 2 and all(error.status == 400 for error in failed)
        assert sum(isinstance(result, wire.Encoded) for result in results) == 20 - len(failed)

    with_pool(tiny_folder(tmp_path / "model"), job, size=2)
    assert wait_until(lambda: not children_of_pool(), 3)


def test_pathological_text_is_fast_enough(tmp_path: Path) -> None:
    """One letter repeated, a merge-heavy run, mixed scripts: within the deadline at the size that passes by bytes."""
    async def job(pool: TextPool) -> None:
        for unit in ("x", " ", "ab", "\u0300", "🙂", "\x00", "<|im_start|>"):
            size = pool.longest_text_bytes(4096) // len(unit.encode())
            begin_s = time.monotonic()
            with contextlib.suppress(ApiError):  # most are too many tokens; that is not the point here
                await pool.encode(unit * size, add_special_tokens=True, max_tokens=4096)
            assert pool.restarts == 0
            assert time.monotonic() - begin_s < text_pool.ENCODE_DEADLINE_S + 1

    with_pool(tiny_folder(tmp_path / "model"), job)


def test_frames_outside_the_schema_are_refused() -> None:
    """Unknown fields, wrong types, values out of range: the decoder refuses, on either side."""
    import msgspec

    good = wire.Encode("x", True, 3)
    assert wire.decode_to_text(wire.frame(good)[4:]) == good
    for wrong in ({"type": "encode", "text": "x", "add_special_tokens": True, "max_tokens": -1},
                  {"type": "encode", "text": "x", "add_special_tokens": 1, "max_tokens": 1},
                  {"type": "encode", "text": "x", "add_special_tokens": True, "max_tokens": 1, "more": 1},
                  {"type": "exec", "text": "x"}, [], "encode", None):
        with pytest.raises(msgspec.DecodeError):
            wire.decode_to_text(msgspec.msgpack.encode(wrong))
    for ids in ([-1], [1 << 31], [1.0], [True], []):
        add = {"type": "add", "request_id": "a", "prompt": ids, "stop_ids": [], "priority": 0, "arrival_s": 0.0,
               "sampling": [1, 0.0, 0, 1.0, 0.0, 0, 0, False, []]}
        with pytest.raises(msgspec.DecodeError):
            wire.decode_to_engine(msgspec.msgpack.encode(add))
    add["prompt"] = [3]
    assert isinstance(wire.decode_to_engine(msgspec.msgpack.encode(add)), wire.Add)
