"""What the extension's tests share: building each kind of allocator, and looking at it from outside (/proc, fstat).

Kinds: "model"; "memfd", "fault"; "cuda", "fault_cuda" on the fake libcuda (fake.py); and "gpu", "fault_gpu", the same
two drivers on the first real GPU (tests/gpu). Knows no expected values.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu_allocator_checks import Cuda
from tests.ext.fake import fake_cuda
from vattention_ext import KvGeometry, KvStats
from vattention_ext.model import KvModel

LINUX = ("memfd", "fault")
KINDS = ("model", *LINUX, "cuda")
GPU = {"gpu": "cuda", "fault_gpu": "fault_cuda"}
PAGE_BYTES = 4096
GPU_PAGE_BYTES = 2 << 20


def geometry(
    layout: str = "mega", slots: int = 4, max_tokens: int = 50, layers: int = 3, page_bytes: int = PAGE_BYTES
) -> KvGeometry:
    """Small and awkward: tokens of 384 bytes (mega) straddle pages of 4 KiB; 50 tokens are 5 groups. Larger pages have
    tokens larger by the same factor."""
    head_dim = 64 * page_bytes // PAGE_BYTES
    if layout == "mega":
        return KvGeometry(layers, 1, head_dim, 2, max_tokens, slots, page_bytes, "mega")
    return KvGeometry(layers - 1, 3, head_dim, 2, max_tokens, slots, page_bytes, "per_layer")


def page_bytes_of(kind: str) -> int:
    """Smallest page of the kind."""
    return GPU_PAGE_BYTES if kind in GPU else PAGE_BYTES


def make(kind: str, shape: KvGeometry, **settings: Any) -> Any:
    """An allocator of the kind. `Any`, because the model and the native class share methods, not a base."""
    if kind == "model":
        return KvModel(shape, **settings)
    from vattention_ext import KvAllocator

    if kind in ("cuda", "fault_cuda"):
        settings["libcuda"] = str(fake_cuda().path)
    return KvAllocator(shape, driver=GPU.get(kind, kind), **settings)


def assert_clean(kind: str) -> None:
    """Nobody did to the fake what may not be done to a GPU, and nothing of it is left."""
    if kind in ("cuda", "fault_cuda"):
        gc.collect()  # an address range lives as long as the last tensor over it
        assert fake_cuda().violations() == []
        assert fake_cuda().leftovers == 0


def groups(stats: KvStats) -> dict[str, int]:
    """The group counts of a moment, without the zeros."""
    names = ("free", "in_use", "look_ahead", "kept", "quarantined", "moving")
    counts = {name: getattr(stats, f"{name}_groups") for name in names}
    assert sum(counts.values()) == stats.total_groups + stats.over_limit_groups, counts
    return {name: count for name, count in counts.items() if count}


def comparable(stats: KvStats) -> dict[str, Any]:
    """All that the model and the native allocator must agree on: everything but times and what only Linux has."""
    times = ("map_wait_us", "grow_us", "fence_wait_us", "driver_time_us")
    hidden = (*times, "last_error", "descriptor", "inode", "mapping_budget")
    return {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats) if f.name not in hidden}


def own_maps(stats: KvStats, kv: Any) -> tuple[int, int, int]:
    """From /proc/self/maps: bytes of the memfd mapped read-write, read-only, and mappings inside the regions."""
    spans = [(region.address, region.address + region.nbytes) for region in kv.regions]
    lowest, highest = min(low for low, _ in spans), max(high for _, high in spans)
    writable = readable = mappings = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        dash = line.index("-")
        low = int(line[:dash], 16)
        if low >= highest:
            continue
        high = int(line[dash + 1 : line.index(" ")], 16)
        if high <= lowest:
            continue
        mappings += any(low < end and start < high for start, end in spans)
        fields = line.split(None, 5)
        if int(fields[4]) == stats.inode and "tessera-kv" in line:
            writable += (high - low) * fields[1].startswith("rw")
            readable += (high - low) * fields[1].startswith("r--")
    return writable, readable, mappings


def words_of(region: Any) -> np.ndarray[Any, Any]:
    """The region as uint64 (nbytes / 8,), writable where pages are. Must not be used after close()."""
    buffer = (ctypes.c_uint8 * region.nbytes).from_address(region.address)
    return np.frombuffer(buffer, dtype=np.uint64)


class GpuWords:
    """A region of a GPU as uint64, one word a copy."""

    def __init__(self, region: Any) -> None:
        self._address, self._cuda = region.address, libcuda()

    def __getitem__(self, index: int) -> int:
        return self._cuda.read(self._address + 8 * index)

    def __setitem__(self, index: int, word: int) -> None:
        self._cuda.write(self._address + 8 * index, word)


@functools.cache
def libcuda() -> Cuda:
    """The real one, on the first GPU."""
    return Cuda(None, 0)


def committed_bytes(stats: KvStats) -> int:
    """Physical bytes behind the memfd."""
    return os.fstat(stats.descriptor).st_blocks * 512
