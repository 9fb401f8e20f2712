"""Random small worlds for the scheduler's tests: a configuration and a workload from one seed."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from tests.core.upstream_model import record

KINDS = ("sarathi", "vllm", "orca", "faster_transformer", "simple_chunking")


def world(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(config, workload) in the recordings' format: ties in arrival, over-long prompts, pools that force preemption."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS + ("sarathi",) * 4)
    block, limit = rng.choice((1, 4, 16)), rng.choice((48, 64, 200))
    per_request = -(-limit // block)
    blocks = rng.choice((per_request + 1, 2 * per_request, 4 * per_request, max(200, 2 * per_request), 2000))
    params: dict[str, Any] = {}
    if kind == "simple_chunking" or kind == "sarathi":
        params["chunk_size"] = rng.choice((4, 16, 64, 512))
    if kind == "vllm" and rng.random() < 0.3:
        params["max_batched_tokens"] = rng.choice((limit // 2, limit, 4 * limit))
    if kind == "sarathi" and rng.random() < 0.2:
        params |= {
            "enable_dynamic_chunking_schedule": True,
            "low_chunk_size": rng.choice((32, 64)),
            "high_chunk_size": rng.choice((64, 96, 256)),
            "chunk_schedule_max_tokens": rng.choice((limit, 4 * limit)),
            "chunk_schedule_stages": rng.choice((1, 2, 4, 7)),
        }
    config = {
        "variant": "serve",
        "scheduler": kind,
        "max_num_seqs": rng.choice((2, 5, 16, 64)),
        "max_model_len": limit,
        "block_size": block,
        "num_gpu_blocks": blocks,
        "pp": rng.choice((1, 1, 1, 2, 4)),
        "step_cost": {"base": 0.01, "per_token": 1e-5},
        "scheduler_params": params,
    }
    now, workload = 0.0, []
    pace = rng.choice((0.0, 0.001, 0.02, 0.5))
    for index in range(rng.randrange(1, 40)):
        now = round(now + (rng.expovariate(1 / pace) if pace and rng.random() < 0.7 else 0.0), 6)
        prompt = rng.randrange(1, limit + 8) if rng.random() < 0.3 else rng.randrange(1, limit // 2)
        room = max(1, limit - prompt)
        workload.append(
            {"id": str(index), "arrival": now, "prompt_tokens": prompt, "max_tokens": rng.randrange(1, room + 2)}
        )
    return config, workload


def _own(name: str, count: int, prompts: tuple[int, int], outputs: tuple[int, int], **config: Any) -> tuple[Any, Any]:
    rng = random.Random(name)
    now, workload = 0.0, []
    for index in range(count):
        now = round(now + rng.expovariate(200), 6)
        prompt = rng.randrange(*prompts)
        if config["max_model_len"] < 500 and index in (5, 9):
            prompt = config["max_model_len"] + (index == 9)  # one prompt as long as may be, one a token longer
        output = rng.randrange(*outputs)
        workload.append({"id": str(index), "arrival": now, "prompt_tokens": prompt, "max_tokens": output})
    defaults = {"variant": "serve", "max_num_seqs": 16, "block_size": 16, "pp": 1}
    return defaults | {"step_cost": {"base": 0.01, "per_token": 1e-5}} | config, workload


def own_worlds() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The worlds whose recordings are committed in tests/core/recordings; written by `python -m tests.core.workloads`.

    Together they catch every mutation; smallpool ends in a victim re-admitted at once, pp2_pressure has victims in
    flight.
    """
    chunk = {"chunk_size": 64}
    return {
        "sarathi_pressure": _own(
            "sarathi_pressure", 20, (20, 200), (20, 90),
            scheduler="sarathi", max_model_len=400, num_gpu_blocks=110, scheduler_params=chunk,
        ),
        "sarathi_smallpool": _own(
            "sarathi_smallpool", 12, (20, 200), (20, 90),
            scheduler="sarathi", max_model_len=500, num_gpu_blocks=40, scheduler_params=chunk,
        ),
        "sarathi_pp2_pressure": _own(
            "sarathi_pp2_pressure", 16, (20, 150), (20, 90),
            scheduler="sarathi", max_model_len=500, num_gpu_blocks=100, pp=2, scheduler_params=chunk,
        ),
        "vllm_pressure": _own(
            "vllm_pressure", 14, (20, 200), (20, 90),
            scheduler="vllm", max_model_len=400, num_gpu_blocks=110, scheduler_params={},
        ),
        "simple_chunking_pressure": _own(
            "simple_chunking_pressure", 14, (20, 200), (20, 90),
            scheduler="simple_chunking", max_model_len=400, num_gpu_blocks=60, scheduler_params=chunk,
        ),
    }  # fmt: skip


def main() -> None:
    """Write the committed recordings anew."""
    folder = Path(__file__).parent / "recordings"
    for name, (config, workload) in own_worlds().items():
        text = json.dumps(record(config, workload), separators=(",", ":"))
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
