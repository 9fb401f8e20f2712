"""What the extension's tests share: building each kind of allocator, and looking at it from outside (/proc, fstat).

Knows no expected values.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from vattention_ext import KvGeometry, KvStats
from vattention_ext.model import KvModel

KINDS = ("model", "memfd", "fault")
PAGE_BYTES = 4096


def geometry(layout: str = "mega", slots: int = 4, max_tokens: int = 50, layers: int = 3) -> KvGeometry:
    """Small and awkward: tokens of 384 bytes (mega) straddle pages of 4 KiB; 50 tokens are 5 groups."""
    if layout == "mega":
        return KvGeometry(layers, 1, 64, 2, max_tokens, slots, PAGE_BYTES, "mega")
    return KvGeometry(layers - 1, 3, 64, 2, max_tokens, slots, PAGE_BYTES, "per_layer")


def make(kind: str, shape: KvGeometry, **settings: Any) -> Any:
    """An allocator of the kind. `Any`, because the model and the native class share methods, not a base."""
    if kind == "model":
        return KvModel(shape, **settings)
    from vattention_ext import KvAllocator

    return KvAllocator(shape, driver=kind, **settings)


def groups(stats: KvStats) -> dict[str, int]:
    """The group counts of a moment, without the zeros."""
    names = ("free", "in_use", "look_ahead", "kept", "quarantined", "moving")
    counts = {name: getattr(stats, f"{name}_groups") for name in names}
    assert sum(counts.values()) == stats.total_groups, counts
    return {name: count for name, count in counts.items() if count}


def comparable(stats: KvStats) -> dict[str, Any]:
    """All that the model and the native allocator must agree on: everything but times and what only Linux has."""
    hidden = ("map_wait_us", "grow_us", "driver_time_us", "descriptor", "inode", "mapping_budget")
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


def committed_bytes(stats: KvStats) -> int:
    """Physical bytes behind the memfd."""
    return os.fstat(stats.descriptor).st_blocks * 512
