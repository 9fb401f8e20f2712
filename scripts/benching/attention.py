"""attention: each backend that fits this machine over slabs of the allocator, both layouts: time, bytes, operations.

Decodes are held against bytes (keys and values read once) over the measured bandwidth, prompts and chunks against
operations over the measured product rate. Layers take turns, so that caches do not help. A paged backend reads the same
work from blocks of a paged store, dealt out in random order; NAME_vattn is set beside NAME_paged, work by work and by
the geometric mean. Slabs and blocks of a work are held at once, and backends take turns. `torch_vattn` and
`torch_paged` are the judges, and are measured only when they are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.core.clock import MonotonicClock
from scripts.benching.ceilings import Device, measure_device
from scripts.benching.drive import NotProduced
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.options import add_run_flags, report_of, split_names
from scripts.benching.shapes import SHAPES, write_folder

if TYPE_CHECKING:
    import torch

    from engine.attention.base import AttentionBackend
    from engine.kv.paged import PagedStore
    from engine.kv.slots import SlotStore
    from engine.loading.spec import ModelSpec
    from engine.runner.batch import Batch
    from vattention_ext import KvGeometry

    Placed = tuple[SlotStore | PagedStore, Batch, torch.Tensor]

JUDGES = ("torch_vattn", "torch_paged")
TWINS = "vattn / paged"  # how many times faster
OVER_ALL = "geometric mean"
LINUX_PAGE_BYTES = 4096
SHAPE = {"cpu": "smollm2-135m", "cuda": "llama3-8b"}
LAYERS = {"cpu": 4, "cuda": 8}
WORK = {
    "cpu": "decode:16x512,decode:16x1024,decode:16x2048,prefill:512,chunk:128@2048",
    "cuda": "decode:64x2048,decode:64x4096,decode:64x8192,prefill:2048,prefill:8192,chunk:512@8192,chunk:512@32768,"
            "chunk:2048@32768",
}  # fmt: skip
SPELLED = re.compile(r"decode:(\d+)x(\d+)|prefill:(\d+)|chunk:(\d+)@(\d+)")


class Work(NamedTuple):
    """sequences, each with its last `queries` of kv_len tokens to attend."""

    name: str
    sequences: int
    queries: int
    kv_len: int

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head."""
        return self.sequences * (self.queries * (self.kv_len - self.queries) + self.queries * (self.queries + 1) / 2)


def parse_work(text: str) -> Work:
    """decode:NxL, prefill:L or chunk:Q@L (Q tokens that end at L). Raises ValueError."""
    found = SPELLED.fullmatch(text)
    numbers = [int(part) for part in found.groups() if part is not None] if found else []
    if not numbers or min(numbers) < 1 or (text[0] == "c" and numbers[0] > numbers[1]):
        raise ValueError(f"work {text!r} is not decode:NxL, prefill:L or chunk:Q@L with Q <= L")
    if text.startswith("decode"):
        return Work(text, numbers[0], 1, numbers[1])
    return Work(text, 1, numbers[0], numbers[-1])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default=None, help="heads and sizes [by device]")
    parser.add_argument("--layers", type=int, default=0, help="layers that take turns [by device]")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--work", default=None, help="decode:NxL, prefill:L, chunk:Q@L with commas [by device]")
    parser.add_argument("--layouts", default="mega,per_layer", help="of the slabs [mega,per_layer]")
    parser.add_argument("--backends", default=None, help="names with commas [all that fit but the judges]")
    parser.add_argument("--block-tokens", type=int, default=32,
                        help="of a paged store, or the next number that its backend and the geometry take [32]")
    add_run_flags(parser, 3)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure. Returns 0; a backend that fails at some work is said and left out there."""
    from engine.attention.base import backends
    from engine.attention.choose import choose_backend, why_not
    from engine.build import fastest_kernels, set_threads

    if rest:
        raise ValueError(f"argument {rest[0]!r} is not expected")
    works = [parse_work(word) for word in split_names(args.work or WORK[args.device])]
    spec = _spec(args)
    if args.block_tokens < 1:
        raise ValueError(f"--block-tokens {args.block_tokens} must be at least 1")
    names = split_names(args.backends or "") or [
        name for name in backends if name not in JUDGES and not why_not(name, args.device, args.dtype, spec.head_dim)
    ]
    for name in names:
        choose_backend(name, args.device, args.dtype, spec.head_dim)
    device = measure_device(args.device, args.dtype)
    report = report_of(args)
    report.environment["shape"] = dataclasses.asdict(spec)
    report.ceilings = dataclasses.asdict(device)
    if args.device == "cpu":
        import torch

        set_threads(report.environment["cores"], fastest_kernels(getattr(torch, args.dtype)))
    by_store: dict[int, list[str]] = {}  # what its blocks are a multiple of, 0 for slabs -> backends
    for name in names:
        caps = backends[name].caps
        by_store.setdefault(caps.block_multiple if caps.paged else 0, []).append(name)
    for layout, work in itertools.product(split_names(args.layouts), works):
        with ExitStack() as memory:
            placed: dict[str, Placed] = {}
            for multiple, group in by_store.items():
                store: AbstractContextManager[Placed] = (
                    blocks(spec, args, work, layout, multiple) if multiple else slabs(spec, args, work, layout)
                )
                placed |= dict.fromkeys(group, memory.enter_context(store))
            for name, seconds in in_turns(placed, spec, args.device, args.runs, f"{work.name} {layout}").items():
                _, batch, q = placed[name]
                record = record_of(work, f"{name} {layout}", seconds, spec, q.element_size(), device)
                if batch.paged is not None:
                    record.details["block_tokens"] = batch.paged.block_tokens
                report.records.append(record)
    if not report.records:
        raise NotProduced("no backend ran any of the work")
    pairs = twins(report.records)
    report.records += [*pairs, *over_all_work(pairs)]
    finish(report, args.json)
    return 0


def _spec(args: argparse.Namespace) -> ModelSpec:
    from engine.loading.spec import read_config

    with tempfile.TemporaryDirectory() as folder:
        spec = read_config(write_folder(args.shape or SHAPE[args.device], Path(folder)))
    return dataclasses.replace(spec, layers=args.layers or LAYERS[args.device])


@contextmanager
def slabs(
    spec: ModelSpec, args: argparse.Namespace, work: Work, layout: str
) -> Iterator[tuple[SlotStore, Batch, torch.Tensor]]:
    """A store with exactly the work's tokens mapped and random, its batch on the device, and queries (N, H, D)."""
    import torch

    from engine.kv.slots import SlotStore
    from vattention_ext import KvAllocator

    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    geometry = _geometry(spec, dtype, work, layout)
    driver = "cuda" if args.device == "cuda" else "memfd"
    allocator = KvAllocator(geometry, driver=driver, pool_groups=work.sequences * geometry.groups_for(work.kv_len))
    store = SlotStore(geometry, allocator, dtype)
    torch.manual_seed(0)
    try:
        slots = [allocator.acquire(work.kv_len) for _ in range(work.sequences)]
        refused = allocator.ensure_many([(int(slot), work.kv_len) for slot in slots])  # type: ignore[arg-type]
        if refused:
            raise ValueError(f"{work.name}: memory for {len(refused)} of {work.sequences} sequences was refused")
        for layer in range(spec.layers):
            for view in store.layer_views(layer):
                for slot in slots:
                    view[slot, : work.kv_len].copy_(
                        torch.randn(work.kv_len, spec.kv_heads, spec.head_dim, device=device).to(dtype))  # fmt: skip
        batch = _batch(work, [int(slot) for slot in slots]).to(device)  # type: ignore[arg-type]
        yield store, batch, torch.randn(batch.num_tokens, spec.heads, spec.head_dim, device=device).to(dtype)
    finally:
        if args.device == "cuda":
            torch.cuda.synchronize()
        store.close()


@contextmanager
def blocks(
    spec: ModelSpec, args: argparse.Namespace, work: Work, layout: str, multiple: int
) -> Iterator[tuple[PagedStore, Batch, torch.Tensor]]:
    """As slabs(), in blocks of a multiple of `multiple` tokens, --block-tokens where that fits. The blocks lie in
    random order, as they do in an engine that has run for a while."""
    import torch

    from engine.kv.paged import PagedStore

    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    geometry = _geometry(spec, dtype, work, layout)
    tokens = block_tokens(args.block_tokens, geometry.token_bytes, multiple)
    geometry = dataclasses.replace(geometry, page_bytes=tokens * geometry.token_bytes)
    pool = work.sequences * geometry.groups_for(work.kv_len)
    store = PagedStore(geometry, pool, dtype, device)
    torch.manual_seed(0)
    try:
        slots = [store.borrow(work.kv_len) for _ in range(work.sequences)]
        store.host_table[:] = torch.randperm(pool, dtype=torch.int32).numpy()[store.host_table]
        store.table.copy_(torch.from_numpy(store.host_table))
        for layer in range(spec.layers):
            for view in store.layer_views(layer):
                for block in view.split(max(1, 1024 // tokens)):
                    block.copy_(torch.randn(block.shape, device=device).to(dtype))
        batch = store.place(_batch(work, slots).to(device))
        yield store, batch, torch.randn(batch.num_tokens, spec.heads, spec.head_dim, device=device).to(dtype)
    finally:
        store.close()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the next slabs take their memory from the driver


def block_tokens(least: int, token_bytes: int, multiple: int) -> int:
    """Tokens of a block: at least `least`, a multiple of `multiple`, and whole Linux pages, which geometries count."""
    step = math.lcm(multiple, LINUX_PAGE_BYTES // math.gcd(LINUX_PAGE_BYTES, token_bytes))
    return -(-least // step) * step


def _geometry(spec: ModelSpec, dtype: torch.dtype, work: Work, layout: str) -> KvGeometry:
    from vattention_ext import KvGeometry

    return KvGeometry(spec.layers, spec.kv_heads, spec.head_dim, dtype.itemsize, work.kv_len, work.sequences,
                      layout=layout)  # fmt: skip


def _batch(work: Work, slots: Sequence[int]) -> Batch:
    """The work's last queries of each slot, on the host."""
    from engine.runner.batch import Row, pack

    return pack([Row(slot, work.kv_len - work.queries, [0] * work.queries, True) for slot in slots])


def in_turns(
    placed: Mapping[str, Placed], spec: ModelSpec, device: str, runs: int, work: str
) -> dict[str, list[float]]:
    """Seconds of one call by backend, a run of every one in turn, so that a clock that moves moves them all. One that
    fails at this work is said and left out."""
    from engine.attention.base import backends

    made, found = {name: backends[name](spec) for name in placed}, {name: list[float]() for name in placed}
    for _ in range(runs):
        for name in list(found):
            try:
                found[name].append(time_of(made[name], *placed[name], device))
            except Exception as error:  # a kernel that does not fit this work; the others may
                print(f"{work} {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
                del found[name]
    for name, seconds in found.items():
        print(f"{work} {name}: {1e6 * min(seconds):,.1f} us", flush=True)
    return found


def time_of(
    backend: AttentionBackend, store: SlotStore | PagedStore, batch: Batch, q: torch.Tensor, device: str
) -> float:
    """Seconds of one call, layers in turn."""
    views = [store.layer_views(layer) for layer in range(store.geometry.layers)]

    def call(turn: int) -> object:
        k, v = views[turn % len(views)]
        return backend.attend(q, k, v, batch)

    if device == "cuda":
        from scripts.gpu_timing import graph_us

        return graph_us(call, len(views)) / 1e6
    return _mean_s(call, len(views))


def _mean_s(call: Callable[[int], object], layers: int, least_s: float = 0.1) -> float:
    """Of whole rounds over the layers, one round first that is not counted, until least_s have passed."""
    clock, rounds, took_s = MonotonicClock(), 0, 0.0
    for turn in range(layers):
        call(turn)
    start_s = clock.now_s()
    while took_s < least_s:
        for turn in range(layers):
            call(turn)
        rounds += 1
        took_s = clock.now_s() - start_s
    return took_s / rounds / layers


def record_of(
    work: Work, variant: str, seconds: Sequence[float], spec: ModelSpec, element_bytes: int, device: Device
) -> Record:
    """Time and the rate that binds it: bytes for decodes, operations for prompts."""
    nbytes = 2.0 * work.sequences * work.kv_len * spec.kv_heads * spec.head_dim * element_bytes
    flops = 4.0 * spec.heads * spec.head_dim * work.pairs
    floor_us = 1e6 * device.least_s(nbytes, flops)
    figures = [Figure("time", "us", tuple(1e6 * one for one in seconds), False, floor_us)]
    if nbytes / device.bytes_s >= flops / device.product_flop_s:
        rates = tuple(nbytes / one / 1e9 for one in seconds)
        figures.append(Figure("bytes", "GB/s", rates, True, device.bytes_s / 1e9))
    else:
        rates = tuple(flops / one / 1e12 for one in seconds)
        figures.append(Figure("products", "TFLOP/s", rates, True, device.product_flop_s / 1e12))
    return Record(work.name, tuple(figures), variant, {"bytes": nbytes, "flops": flops})


def twins(records: Sequence[Record]) -> list[Record]:
    """For each NAME_vattn beside a NAME_paged at the same work and layout: how many times faster it is."""
    runs = {(record.workload, record.variant): record.figures[0].runs for record in records}
    found = []
    for (workload, variant), ours in runs.items():
        theirs = runs.get((workload, variant.replace("_vattn", "_paged")))
        if "_vattn" in variant and theirs is not None:
            ratios = tuple(b / a for a, b in zip(ours, theirs, strict=True))
            found.append(Record(workload, (Figure(TWINS, "x", ratios, True),), variant))
    return found


def over_all_work(pairs: Sequence[Record]) -> list[Record]:
    """Of twins' records: for each pair and layout the geometric mean over its work, run by run."""
    by_variant: dict[str, list[Record]] = {}
    for pair in pairs:
        by_variant.setdefault(pair.variant, []).append(pair)
    found = []
    for variant, records in by_variant.items():
        runs = zip(*(record.figures[0].runs for record in records), strict=True)
        means = tuple(statistics.geometric_mean(ratios) for ratios in runs)
        details = {"work": [record.workload for record in records]}
        found.append(Record(OVER_ALL, (Figure(TWINS, "x", means, True),), variant, details))
    return found
