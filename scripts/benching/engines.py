"""Opening the engine that is measured: --model or --shape, every flag of the engine, and the device's ceilings first.

Flags that a benchmark does not know itself are the engine's (docs/flags.md), spelled as for the server. The engine runs
in this process, its collector settled as in the engine process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.clock import MonotonicClock
from engine.core.config import EngineConfig
from engine.core.heap import settle_heap
from engine.loading.resolve import resolve_model
from engine.serve.flags import parse
from scripts.benching.ceilings import Costs, Device, costs_of, measure_device
from scripts.benching.shapes import SHAPES, write_folder
from scripts.benching.workloads import Workload

if TYPE_CHECKING:
    from engine.core.loop import EngineLoop
    from engine.loading.spec import ModelSpec

DEFAULTS = ("--max-num-seqs", "512")  # unless given: as many as the peer ran at once


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """An engine, what it was built from, and what its device allows. ready_s: seconds that building took."""

    loop: EngineLoop
    config: EngineConfig
    spec: ModelSpec
    costs: Costs
    device: Device
    model: str
    ready_s: float

    def check_fits(self, workload: Workload) -> None:
        """Raise ValueError when a request of the workload is longer than the engine takes."""
        length = self.loop.scheduler.length_limit
        if workload.longest_tokens > length:
            raise ValueError(f"{workload.name} has a request of {workload.longest_tokens} tokens and this engine takes "
                             f"{length}; use a larger --max-model-len or --kv-pool-bytes, or --shrink")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model and --shape; what the parser does not know is left to the engine."""
    parser.add_argument("--model", default=None, help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=tuple(SHAPES), default=None, help="random weights of this shape instead")
    parser.epilog = "Every other flag is the engine's: docs/flags.md."


@contextlib.contextmanager
def model_flags(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(the model's name, the server's flags for it); a shape's folder lives as long as this does.

    The model is there when this returns: fetching and converting it is nobody's start-up.
    """
    if args.shape and args.model:
        raise ValueError("--shape and --model both name a model; give one")
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        if args.shape:
            made = write_folder(args.shape, Path(folder, args.shape), getattr(args, "positions", 0))
            yield args.shape, ["--model", str(made), "--load-format", "dummy"]
        else:
            found = resolve_model(args.model)
            yield args.model or found.name, ["--model", str(found)]


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """A configuration for JSON."""
    return {name: "never" if value == math.inf else value for name, value in dataclasses.asdict(config).items()}


@contextlib.contextmanager
def opened(args: argparse.Namespace, rest: Sequence[str]) -> Iterator[Opened]:
    """Measure the device, build the engine, close it at the end. rest: the engine's flags.

    Raises ConfigError for a flag that cannot be honoured.
    """
    import torch

    from engine.build import build_engine, resolve

    with model_flags(args) as (name, flags):
        given = parse([*flags, *DEFAULTS, *rest], "scripts.bench").engine
        config, spec, _ = resolve(given)
        device = measure_device(config.device, config.dtype)
        clock = MonotonicClock()
        start_s = clock.now_s()
        loop = build_engine(given)
        ready_s = clock.now_s() - start_s
        settle_heap()
        costs = costs_of(spec, getattr(torch, config.dtype).itemsize)
        try:
            yield Opened(loop, config, spec, costs, device, name, ready_s)
        finally:
            loop.close()
            gc.unfreeze()  # or the interpreter's end finds what was frozen, and native types complain
