"""When a GPU is used, and what is done on it before the first request: a step's peak, graphs, the pool's size.

It builds no part of an engine and runs no request.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.core.config import EngineConfig
from engine.core.errors import ConfigError
from engine.core.request import SamplingParams
from engine.kv.slots import SlotStore
from engine.loading.spec import ModelSpec
from engine.parts.cuda_kernels import CudaLayer
from engine.runner.batch import Row, pack
from engine.runner.device_sampler import DeviceSampler
from engine.runner.graphs import DecodeGraphs
from engine.runner.pieces import PieceGraphs
from engine.runner.runner import Runner
from engine.runner.sampler import Pick
from engine.scx.sessions import NONCE_BYTES

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
LEAST_CAPABILITY = (8, 0)  # bf16 products and asynchronous copies, which our kernels use
LEAST_REHEARSED = 2  # tokens of the slot that start-up runs its steps in: the shortest prompt that is none of decodes
MOST_PIECE_TOKENS = 4096  # a longer step keeps the GPU busy for longer than its launches take


def choose_device(asked: str) -> str:
    """"cuda" or "cpu"; the log says which and why. "auto" takes a GPU that our kernels run on.

    Raises ConfigError when a GPU is asked for and cannot be used.
    """
    if asked == "cpu":
        return "cpu"
    lacking = lacks_gpu()
    if lacking is None:
        log.info("device cuda: %s", torch.cuda.get_device_name(0))
        return "cuda"
    if asked == "cuda":
        raise ConfigError(f"--device cuda: {lacking}; use --device cpu")
    log.info("device cpu: %s", lacking)
    return "cpu"


def lacks_gpu() -> str | None:
    """Why a GPU cannot be used here; None when it can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    found = torch.cuda.get_device_capability(0)
    if found < LEAST_CAPABILITY:
        return f"the GPU's compute capability is {found[0]}.{found[1]}, and {LEAST_CAPABILITY[0]}.0 is the least"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def rehearsal(slot: int, tokens: int, sequences: int) -> Iterator[list[Row]]:
    """Steps of few and of many short prompts with a decode behind them, and one in which all `sequences` sample; all in
    one slot that holds `tokens`.

    Kernels are built for counts of sequences, and memory is taken for numbers of rows; neither shall happen while
    somebody waits: a call that takes memory from the driver waits for every step under way.
    """
    for prompts in (1, 2, 17, 65, 257):
        if 2 * prompts < tokens:
            yield [*(Row(slot, 0, [0, 0], True) for _ in range(prompts)), Row(slot, 1, [0], True)]
    yield [Row(slot, 0, [0, 0], True), *(Row(slot, 1, [0], True) for _ in range(sequences - 1))]
    for count in (min(128, tokens // 4), min(512, tokens // 4)):  # short and long chunks of a long prompt, one and two
        if count > 1:
            yield [Row(slot, tokens - count, [0] * count, True)]
            yield [Row(slot, tokens - count, [0] * count, True)] * 2


def rehearse(runner: Runner, slot: int, tokens: int, sequences: int) -> None:
    """Run the rehearsal, sampled greedily and by every rule, and take the pinned memory that steps are staged in."""
    rules = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, seed=0)
    for rows in rehearsal(slot, tokens, sequences):
        step = runner.store.place(runner.widened(pack(rows)).to(runner.device))
        in_pieces = runner.pieces is not None and runner.pieces.fits(step)
        logits = (runner.pieces if runner.pieces is not None and in_pieces else runner.model)(step)
        for params in (SamplingParams(temperature=0.0), rules):
            runner.sampler(logits, [Pick(params, 0, frozenset())] * logits.shape[0])
    for power in range(9, 21):
        _ = [torch.empty(1 << power, dtype=torch.uint8, pin_memory=True) for _ in range(4)]


def prepare_gpu(
    runner: Runner, spec: ModelSpec, config: EngineConfig, pool_groups: int, progress: Progress | None
) -> int:
    """Run the largest step once, record the graphs, and size the pool by what memory is left. Returns its groups.

    The step's peak stays with PyTorch's allocator, so what is free afterwards is the pool's to take. An explicit pool
    size is kept.
    """
    store, geometry = runner.store, runner.store.geometry
    tokens = min(config.high_chunk_tokens or config.chunk_tokens or geometry.max_tokens, geometry.max_tokens)
    tokens = max(tokens, LEAST_REHEARSED)
    slot = store.borrow(tokens)
    if runner.scx is not None:
        if not (runner.scx.scx.secure.in_stream or config.enforce_eager):
            log.info("the host waits for the secure side in every encoded layer; graphs hold what stands in between")
        runner.scx.scx.secure.open(slot, secrets.token_bytes(NONCE_BYTES))
    with torch.inference_mode():
        step = pack([Row(slot, 0, [0] * tokens, True)]).to(runner.device)
        runner.model(store.place(step))
        with contextlib.nullcontext() if runner.scx is None else runner.scx.recording():
            if not config.enforce_eager:
                record_graphs(runner, spec, config, tokens, progress)
            if runner.scx is None or runner.scx.scx.secure.in_stream:  # others answer for a slot once a step
                rehearse(runner, slot, tokens, config.max_num_seqs)
    torch.cuda.synchronize()
    if runner.scx is not None:
        runner.scx.scx.secure.close(slot)
    store.give_back(slot)
    if not isinstance(store, SlotStore):
        return pool_groups
    if config.kv_pool_bytes is None and config.kv_pool_groups is None:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        spare_bytes = int(total_bytes * (1 - config.gpu_memory_utilization))
        pool_groups = min(pool_groups, max(1, (free_bytes - spare_bytes) // geometry.group_bytes))
    log.info("KV pool of %d groups, %d MiB", pool_groups, pool_groups * geometry.group_bytes >> 20)
    store.set_limit(pool_groups)
    return pool_groups


def record_graphs(
    runner: Runner, spec: ModelSpec, config: EngineConfig, tokens: int, progress: Progress | None
) -> None:
    """Give the runner the graphs that its model allows. tokens: prompt tokens of the largest step."""
    layers = getattr(runner.model, "layers", [])
    if layers and all(isinstance(layer, CudaLayer) for layer in layers):
        most = min(tokens + config.max_num_seqs, MOST_PIECE_TOKENS)
        split: Any = runner.model
        pieces = PieceGraphs(split, runner.device, most, heads=spec.heads, head_dim=spec.head_dim)
        pieces.capture(progress)
        runner.pieces = pieces
    if runner.replayable:
        assert isinstance(runner.sampler, DeviceSampler)
        graphs = DecodeGraphs(runner.model, runner.store.place, runner.newest, runner.sampler, runner.device,
                              min(config.max_num_seqs, 512))  # fmt: skip
        graphs.capture(progress)
        runner.graphs = graphs
