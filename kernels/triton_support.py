"""What the Triton launchers share: argument checks, precision, device facts and the table of measured settings.

It knows shapes and strides of tensors, never their meaning. Importing it needs Triton; the CPU's kernels never do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require

TUNING = Path(__file__).parent / "tuning"
LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def gdc_wait():
    """Wait until the kernels launched before have ended and their writes are visible."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def gdc_launch():
    """Let the next kernel of the stream start its own prologue now."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=tl.int32,
                              is_pure=False, pack=1)  # fmt: skip


if triton.knobs.runtime.interpret:

    @triton.jit
    def join_threads():
        """Nothing to wait for: the interpreter runs a program as one thread."""
        tl.debug_barrier()

else:

    @triton.jit
    def join_threads():
        """A program's threads wait for each other. tl.debug_barrier would keep Triton from overlapping the loads of a
        loop that it stands in; this it does not see."""
        tl.inline_asm_elementwise("bar.sync 0; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def precision(dtype: torch.dtype) -> str:
    """Triton's input_precision of a product: float32 is multiplied as float32, never as TF32."""
    return "ieee" if dtype is torch.float32 else "tf32"


@cache
def starts_early() -> bool:
    """Whether kernels of the current device may start while the one before ends."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def early(enabled: bool) -> dict[str, Any]:
    """Launch options of a kernel that may start before the one ahead has ended (it waits inside by gdc_wait)."""
    return {"PDL": True, "launch_pdl": True} if enabled else {"PDL": False}


@dataclass(frozen=True, slots=True)
class Slab:
    """The strides, in elements, of two equal (S, C, G, D) views: what kernels need to find a row."""

    slot_stride: int
    token_stride: int
    head_stride: int
    kv_heads: int
    dim: int


def slab_of(k_view: torch.Tensor, v_view: torch.Tensor, dtype: torch.dtype) -> Slab:
    """Checks the two views and returns their strides. Raises ValueError when they differ or heads have gaps."""
    require(k_view.dim() == 4 and k_view.shape == v_view.shape and k_view.stride() == v_view.stride(),
            "k_view is %s %s and v_view %s %s; want equal (S, C, G, D) shapes and strides", tuple(k_view.shape),
            k_view.stride(), tuple(v_view.shape), v_view.stride())  # fmt: skip
    require(k_view.stride(3) == 1 and k_view.dtype is dtype and v_view.dtype is dtype,
            "k_view is %s with element stride %s and v_view %s; want %s with contiguous heads", k_view.dtype,
            k_view.stride(3), v_view.dtype, dtype)  # fmt: skip
    slot, token, head, _ = k_view.stride()
    return Slab(slot, token, head, k_view.shape[2], k_view.shape[3])


def table_stride(table: torch.Tensor | None) -> int:
    """Elements from one slot's row of a block table to the next; 1 where there is none. Raises ValueError for a wrong
    dtype or stride."""
    if table is None:
        return 1
    require(table.dim() == 2 and table.dtype is torch.int32 and table.stride(1) == 1,
            "table is %s %s; want (S, M) torch.int32 with contiguous rows", tuple(table.shape), table.dtype)
    return table.stride(0)


def require_float(name: str, x: torch.Tensor) -> None:
    """`x` has an element type these kernels take."""
    require(x.dtype in DTYPES, "%s is %s; want one of %s", name, x.dtype, DTYPES)


@cache
def multiprocessors(device_index: int) -> int:
    """Streaming multiprocessors of a device; 4 where there is none (the interpreter)."""
    if not torch.cuda.is_available():
        return 4
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def sms_of(x: torch.Tensor) -> int:
    """Multiprocessors of the device that holds `x`."""
    return multiprocessors(x.device.index or 0 if x.is_cuda else -1)


@cache
def tuning(device_name: str) -> dict[str, Any]:
    """The measured settings of a device, by operation; empty where nobody measured.

    The file kernels/tuning/<name>.json is written by `python -m scripts.gpu_kernels --json` on that device.
    """
    path = TUNING / (device_name.lower().replace(" ", "_") + ".json")
    if not path.is_file():
        return {}
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
    return settings


def settings_for(x: torch.Tensor, op: str) -> dict[str, Any]:
    """The measured settings of `op` on the device of `x`."""
    if not x.is_cuda:
        return {}
    found: dict[str, Any] = tuning(torch.cuda.get_device_name(x.device)).get(op, {})
    return found


def power_of_two(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def room_for(sequences: int) -> int:
    """The size a kernel's vector over sequences is built with: 16, 64, 256, ...; few sizes, few binaries."""
    return 1 << max(4, (sequences - 1).bit_length() + (sequences - 1).bit_length() % 2)
