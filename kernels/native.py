"""Which element types have C++ kernels on this CPU, and how many threads they use.

It knows nothing of operations. Where the extension or the instructions are missing, every launcher falls back to
its reference in torch: correct, slower, and without the bitwise promise of the C++ kernels.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tessera_kernels import _cpu

_extension: ModuleType | None = None
try:
    _extension = import_module("tessera_kernels._cpu")
except ImportError:
    pass  # not built: the references still work


def _open_ops() -> dict[torch.dtype, _cpu.Ops]:
    """One table of kernels for each element type this CPU can run."""
    found: dict[torch.dtype, _cpu.Ops] = {}
    if _extension is not None and _extension.has_bf16():
        found[torch.bfloat16] = _extension.Ops(2, False)
    if _extension is not None and _extension.has_f32():
        found[torch.float32] = _extension.Ops(4, False)
    return found


OPS = _open_ops()  # filled once at import, never changed


def available(dtype: torch.dtype | None = None) -> bool:
    """Whether `dtype` runs on C++ kernels here; without an argument, whether any does."""
    return bool(OPS) if dtype is None else dtype in OPS


def isa(dtype: torch.dtype) -> str:
    """Name of the instruction set `dtype` runs on: avx512_bf16, avx512, avx2, or torch where none does."""
    return OPS[dtype].isa if dtype in OPS else "torch"


def set_threads(threads: int) -> None:
    """Threads a kernel runs on, the calling one included: 1..1024. Results do not depend on it.

    Raises ValueError outside the range. Default: the CPUs this process may use.
    """
    if _extension is not None:
        _extension.set_threads(threads)


def threads() -> int:
    """Threads a kernel runs on; 1 where there are no C++ kernels."""
    return _extension.threads() if _extension is not None else 1


def extension() -> ModuleType:
    """The C++ module. Raises RuntimeError where it was not built."""
    if _extension is None:
        raise RuntimeError("tessera_kernels._cpu is not built; run `make install` (needs a C++ compiler)")
    return _extension
