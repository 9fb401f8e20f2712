"""What the machine allows: copy bandwidth and product rate, measured now, and the least time a workload can take.

The floors assume kernels at full speed, no overhead, and products and attention one after the other; each part takes
the longer of its bytes over the bandwidth and its operations over the rate. So no engine of this kind can be faster,
and real kernels at small batches cannot come near. It knows shapes, not engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from engine.core.clock import MonotonicClock
from scripts.benching.workloads import Item

if TYPE_CHECKING:
    import torch

    from engine.loading.spec import ModelSpec

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
LONG_ENOUGH_S = 0.03


@dataclass(frozen=True, slots=True)
class Device:
    """bytes_s: of a large copy, bytes read and written (on a CPU, where a copy also reads what it overwrites,
    of a large sum where that is faster); product_flop_s: of a large square product."""

    name: str
    bytes_s: float
    product_flop_s: float

    def least_s(self, nbytes: float, flops: float) -> float:
        """The longer of both."""
        return max(nbytes / self.bytes_s, flops / self.product_flop_s)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one token of a model costs. weight_bytes: read by each step, head included, embedding not; layer_flops: of a
    token through all layers; head_flops: of a sampled one; kv_bytes: of one cached token in all layers, K and V;
    pair_flops: of one query against one cached token in all layers.
    """

    weight_bytes: float
    layer_flops: float
    head_flops: float
    kv_bytes: float
    pair_flops: float


def costs_of(spec: ModelSpec, element_bytes: int) -> Costs:
    """Costs of a dense Llama-like model. Norms and biases are left out; a sliding window is not taken off."""
    attention = spec.hidden * (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    layers = spec.layers * (attention + 3 * spec.hidden * spec.ffn)
    head = spec.vocab * spec.hidden
    return Costs(
        weight_bytes=(layers + head) * element_bytes,
        layer_flops=2.0 * layers,
        head_flops=2.0 * head,
        kv_bytes=2.0 * spec.layers * spec.kv_heads * spec.head_dim * element_bytes,
        pair_flops=4.0 * spec.layers * spec.heads * spec.head_dim,
    )


def prefill_floor_s(costs: Costs, device: Device, tokens: int) -> float:
    """A prompt alone, to its first token."""
    products = device.least_s(costs.weight_bytes, tokens * costs.layer_flops + costs.head_flops)
    return products + device.least_s(tokens * costs.kv_bytes, tokens * (tokens + 1) / 2 * costs.pair_flops)


def decode_floor_s(costs: Costs, device: Device, sequences: int, cached_tokens: float) -> float:
    """One step of `sequences` decodes with so many cached tokens each (mean)."""
    products = device.least_s(costs.weight_bytes, sequences * (costs.layer_flops + costs.head_flops))
    cached = sequences * cached_tokens
    return products + device.least_s(cached * costs.kv_bytes, cached * costs.pair_flops)


def request_floor_s(costs: Costs, device: Device, item: Item) -> float:
    """One request alone, from its prompt to its last token."""
    decodes = item.output_tokens - 1
    return prefill_floor_s(costs, device, item.prompt_tokens) + decodes * decode_floor_s(
        costs, device, 1, item.prompt_tokens + (decodes + 1) / 2)  # fmt: skip


def workload_floor_s(costs: Costs, device: Device, items: Sequence[Item], max_num_seqs: int) -> float:
    """All requests, there at once: no less than their work in all, and no less than any one of them alone."""
    outputs = sum(item.output_tokens for item in items)
    steps = max(max(item.output_tokens for item in items), -(-outputs // max_num_seqs))
    run = sum(item.prompt_tokens + item.output_tokens - 1 for item in items)  # a last token is never run
    products = device.least_s(steps * costs.weight_bytes, run * costs.layer_flops + outputs * costs.head_flops)
    decoded = sum((o - 1) * p + (o - 1) * o / 2 for _, p, o in items)  # cached tokens over all decodes
    prefilled = sum(p * (p + 1) / 2 for _, p, _ in items)
    cached = decoded + sum(item.prompt_tokens for item in items)
    attention = device.least_s(cached * costs.kv_bytes, (decoded + prefilled) * costs.pair_flops)
    return max(products + attention, max(request_floor_s(costs, device, item) for item in set(items)))


def measure_device(kind: str, dtype: str) -> Device:
    """Measure "cpu" or "cuda" in a few 100 ms, with all usable cores. dtype: of the product, a torch name.

    A CPU without instructions for a type multiplies it as float32 (PyTorch takes far longer), so that rate counts, too.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        name = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
        types = {getattr(torch, dtype), *((torch.float32,) if kind == "cpu" else ())}
        return Device(name, _bytes_s(kind), max(_product_flop_s(kind, one) for one in types))
    finally:
        torch.set_num_threads(threads)
        if kind == "cuda":
            torch.cuda.empty_cache()  # the engine's to take


def _bytes_s(kind: str) -> float:
    """See Device."""
    import torch

    source = torch.ones(COPY_BYTES[kind] // 8, dtype=torch.int64, device=kind)
    target = torch.empty_like(source)
    copied = 2 * COPY_BYTES[kind] / least_call_s(lambda: target.copy_(source), kind, calls=5)
    return copied if kind == "cuda" else max(copied, COPY_BYTES[kind] / least_call_s(source.sum, kind, calls=5))


def _product_flop_s(kind: str, dtype: torch.dtype) -> float:
    """Of random square matrices, doubled until a product takes long enough (at most 8192^3)."""
    import torch

    size = 8192 if kind == "cuda" else 512
    while True:
        a, b = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
        seconds = least_call_s(partial(torch.mm, a, b), kind, calls=4)
        if seconds >= LONG_ENOUGH_S or size >= 8192:
            return 2.0 * size**3 / seconds
        size *= 2


def least_call_s(call: Callable[[], object], kind: str, calls: int) -> float:
    """Shortest of `calls` calls, the device waited for each time; one more before that is not counted."""
    import torch

    clock, best = MonotonicClock(), float("inf")
    for turn in range(calls + 1):
        start_s = clock.now_s()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock.now_s() - start_s) if turn else best
    return best
