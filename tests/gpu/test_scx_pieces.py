"""Engines whose encoded layers wait for a secure worker, in recorded pieces: the plain engine's tokens; and a worker
that dies between two pieces of a step fails that step closed, and the next one works.

Without a GPU it runs under Triton's interpreter, where nothing is recorded and pieces run again:
TRITON_INTERPRET=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

pytest.importorskip("triton")
import triton

from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams
from engine.runner.batch import Batch
from engine.runner.pieces import PieceGraphs
from engine.scx import remote
from scripts import gpu_correctness as correctness
from tests.engine import oracle
from tests.scx.workers import end, start_process

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
OUTPUTS = 4
SMALL = {"max_num_seqs": 4, "max_model_len": 64, "chunk_tokens": 24}
PROMPTS = [[7 + 3 * i % 400 for i in range(count)] for count in (1, 30, 9)]  # the second in chunks, beside decodes
LOST = "secure worker was lost"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = tmp_path_factory.mktemp("tiny")
    correctness.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tiny: Path) -> list[list[int]]:
    """Tokens of PyTorch's kernels on a CPU, nothing encoded and nothing recorded."""
    engine = oracle.make_engine(tiny, kernels="torch", device="cpu", attention_backend="torch_vattn", **SMALL)
    tokens = [tokens for tokens, _ in run(engine).values()]
    engine.close()
    return tokens


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts a worker at tmp_path / "worker"; all of them end with the test."""
    started: list[Any] = []

    def start() -> Any:
        started.append(start_process(str(tmp_path / "worker")))
        return started[-1]

    yield start
    for process in started:
        end(process)


def in_pieces(folder: Path, path: Path, **settings: Any) -> EngineLoop:
    """An engine with a worker at `path`, no step of which runs but in pieces."""
    engine = oracle.make_engine(folder, kernels="cuda", device=DEVICE, attention_backend="triton_vattn" if DEVICE ==
                                "cuda" else "torch_vattn", scx_secure_device=f"unix:{path}", **SMALL,
                                **settings)  # fmt: skip
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    if INTERPRETED:
        runner.pieces = PieceGraphs(runner.model, runner.device, 28, heads=16, head_dim=128, record=lambda work: work)
        runner.pieces.capture()
    assert runner.graphs is None

    def whole(batch: Batch) -> NoReturn:
        raise AssertionError(f"a step of {batch.num_tokens} tokens did not run in pieces")

    runner.model = whole
    return engine


def asked(number: int) -> Request:
    """A prompt, greedy."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
    return Request(str(number), tuple(PROMPTS[number]), params, number * 1e-6)


def run(engine: EngineLoop) -> dict[str, tuple[list[int], str]]:
    """Tokens and finish reason, or error, of each prompt; they come one step after the other."""
    found: dict[str, tuple[list[int], str]] = {}
    step = 0
    while engine.has_work or step < len(PROMPTS):
        if step < len(PROMPTS):
            engine.add(asked(step))
            found[str(step)] = ([], "")
        for update in engine.step():
            tokens, ended = found[update.request_id]
            found[update.request_id] = (tokens + list(update.tokens), update.error or update.finish_reason or ended)
        step += 1
    return found


@pytest.mark.parametrize("settings", [
    {"scx_layers": "0,2"},
    {"scx_layers": "all", "scx_scheme": "mix", "scx_page_seal": True, "scx_seal_tokens": 8},
    {"scx_layers": "1,3", "scx_segment_tokens": 16},
], ids=["perm", "mix-sealed", "segments"])  # fmt: skip
def test_tokens_are_the_plain_engines(
    settings: dict[str, Any], tiny: Path, plain: list[list[int]], worker: Callable[[], Any], tmp_path: Path
) -> None:
    """A prompt of one token, one in chunks beside decodes, decodes alone, at the end a single one."""
    worker()
    engine = in_pieces(tiny, tmp_path / "worker", **settings)
    assert list(run(engine).values()) == [(tokens, "length") for tokens in plain]
    engine.close()


def test_a_worker_lost_between_two_pieces(
    tiny: Path, plain: list[list[int]], worker: Callable[[], Any], tmp_path: Path
) -> None:
    """kill -9 between a layer's encode and its decode: the requests of the step end with an error, later layers are not
    written; with another worker the same engine gives the plain tokens."""
    process = worker()
    engine = in_pieces(tiny, tmp_path / "worker", scx_layers="0,2")
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    calls: list[int] = []
    before: list[torch.Tensor] = []

    def written() -> list[torch.Tensor]:
        slots = sorted(runner.scx._slots.values())
        return [side[slots, :12].clone() for side in runner.store.layer_views(2)]

    def watch(view: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        if "qkv" in tensors:
            calls.append(layer)
        if len(calls) == 5 and not before:  # the third step's first encoded layer; prompts are done
            before.extend(written())
            end(process)

    runner.scx.scx.observer = watch
    for name in ("0", "2"):
        engine.add(asked(int(name)))
    ends: dict[str, str | None] = {}
    while not ends:
        ends = {update.request_id: update.error for update in engine.step() if update.finish_reason}
    assert set(ends) == {"0", "2"} and all(LOST in (said or "") for said in ends.values())
    assert calls == [0, 2, 0, 2, 0]
    after = written()
    assert after[0].shape[0] == 2 and all(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    runner.scx.scx.observer = None
    worker()
    time.sleep(remote.AGAIN_S)
    assert list(run(engine).values()) == [(tokens, "length") for tokens in plain]
    engine.close()
