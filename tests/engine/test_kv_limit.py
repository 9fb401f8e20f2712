"""The KV limit of a running engine: memory beyond it goes back to the system, and answers do not change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.errors import RequestError
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams
from tests.models import tiny_llama_dir

PROMPTS = [[(3 * i + j) % 512 for j in range(40 + 30 * i)] for i in range(6)]
OUTPUTS = 40


def answers(engine: EngineLoop) -> dict[str, list[int]]:
    """Every prompt at once, to the end."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(f"{i}", tuple(prompt), params, 0.0))
    found: dict[str, list[int]] = {f"{i}": [] for i in range(len(PROMPTS))}
    while engine.has_work:
        for update in engine.step():
            assert update.finish_reason in (None, "length")
            found[update.request_id] += update.tokens
    return found


def seen_by_another(descriptor: int) -> int:
    """Physical bytes of our pool, as another process counts them."""
    program = f"import os; print(os.stat('/proc/{os.getpid()}/fd/{descriptor}').st_blocks * 512)"
    return int(subprocess.run([sys.executable, "-ISc", program], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_another_process_sees_the_memory_it_left(tmp_path: Path, layout: str) -> None:
    """Kept pages go back when the limit falls; the answers under it are the same; raising it takes nothing yet."""
    engine = build_engine(
        EngineConfig(model=str(tiny_llama_dir(tmp_path)), kv_pool_bytes=8 << 20, kv_page_bytes=16384,
                     kv_layout=layout, max_num_seqs=6, max_model_len=512)
    )  # fmt: skip
    try:
        store = engine.executor.runner.store  # type: ignore[attr-defined]
        group_bytes = store.geometry.group_bytes
        start = store.allocator.stats().total_groups
        whole = answers(engine)
        descriptor = store.allocator.stats().descriptor
        one = store.geometry.groups_for(len(PROMPTS[-1]) + OUTPUTS)
        assert seen_by_another(descriptor) > 3 * one * group_bytes
        assert engine.set_kv_limit(one) == 0
        deadline_s = time.monotonic() + 10
        while (left := seen_by_another(descriptor)) > one * group_bytes and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert left <= one * group_bytes
        assert answers(engine) == whole, "one at a time, or preempted, but the same tokens"
        assert store.allocator.stats().physical_bytes <= one * group_bytes
        store.allocator.check()
        engine.set_kv_limit(start)
        assert seen_by_another(descriptor) <= one * group_bytes
        assert answers(engine) == whole
    finally:
        engine.close()


def test_lowered_under_use(tmp_path: Path) -> None:
    """In mid-decode to what the longest request needs: others are preempted as they grow and still get their tokens."""
    engine = build_engine(
        EngineConfig(model=str(tiny_llama_dir(tmp_path)), kv_pool_bytes=8 << 20, kv_page_bytes=16384, max_num_seqs=6,
                     max_model_len=512)
    )  # fmt: skip
    try:
        whole = answers(engine)
        store = engine.executor.runner.store  # type: ignore[attr-defined]
        one = store.geometry.groups_for(len(PROMPTS[-1]) + OUTPUTS)
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            engine.add(Request(f"{i}", tuple(prompt), params, 0.0))
        found: dict[str, list[int]] = {f"{i}": [] for i in range(len(PROMPTS))}
        steps = 0
        while engine.has_work:
            for update in engine.step():
                found[update.request_id] += update.tokens
            steps += 1
            if steps == 5:
                with pytest.raises(RequestError, match=f"{one}"):
                    engine.set_kv_limit(one - 1)
                assert engine.set_kv_limit(one) > one
        assert found == whole
        assert engine.stats()["preempted_total"] > 0
    finally:
        engine.close()
