"""vattention_ext: a KV cache in virtual memory, mapped on demand. START HERE: geometry.py, values.py, allocator.py.

Knows neither torch nor the engine. Importing this package loads no extension: KvAllocator is loaded when first named,
so that the pure-Python model (vattention_ext.model) works where nothing was built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .geometry import KvGeometry
from .values import DriverError, KvStats, OutOfPages, OutOfSlots, Region, Ticket

if TYPE_CHECKING:
    from .allocator import KvAllocator

__all__ = ["DriverError", "KvAllocator", "KvGeometry", "KvStats", "OutOfPages", "OutOfSlots", "Region", "Ticket"]


def __getattr__(name: str) -> Any:
    if name == "KvAllocator":
        from .allocator import KvAllocator

        return KvAllocator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
