"""Work of the CPU that stands in a GPU's stream: rows are mapped in C++ when the stream comes to it.

A job is launched like a kernel, so the thread that launches waits for nothing, and a CUDA graph may hold it. It reads
and writes host memory by addresses, which must stay where they are until it has run: for good where a graph holds it.
Between a copy from the device and one back, a job is a round trip through the host. Without a device (tests) jobs run
at once.

With a Bell the stream calls a thread that looks for work without pause, by a kernel that writes a word of host memory;
without one the driver wakes a thread of its own (cuLaunchHostFunc), which takes the system's time.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from tessera_kernels import native
from tessera_kernels.cores import usable_cores
from tessera_kernels.native import OPS


class Crossing(NamedTuple):
    """Where N tokens lie on the host: what came (N, ...), what will go back (N, ...), positions and table rows (N,)
    int32, own (N,) int32: 0..N-1. A token whose table row is outside the tables is left as it was."""

    came: torch.Tensor
    goes: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    own: torch.Tensor


# of a bell: rows of a decode step are little work. On an H200's machine its jobs take half as long with 4 as those of
# host functions, which have PyTorch's threads, and with 2 or fewer longer
LEAST_THREADS, MOST_THREADS = 4, 8
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def bell_threads() -> int:
    """Threads of a bell: half of the cores that this process may use, within what helps."""
    return max(1, min(MOST_THREADS, usable_cores() // 2))


def bell_pays() -> bool:
    """Whether there are cores enough for a bell."""
    return bell_threads() >= LEAST_THREADS


class Bell:
    """A thread of the CPU for one stream's jobs, and others that help it: half of the cores, 8 at most. They look for
    work without pause until none came for 20 ms. word: (1,) int32, the number of the job that is called, or 0."""

    def __init__(self, threads: int | None = None) -> None:
        """Raises ValueError for threads outside 1..1024."""
        pinned = torch.cuda.is_available()
        self.word = torch.zeros(16, dtype=torch.int32, pin_memory=pinned)[:1]  # nothing else lies on its line
        self._thread = native.extension().Bell(self.word.data_ptr(), threads or bell_threads())
        self.stop = weakref.finalize(self, _end, self._thread, pinned)  # when Python ends, at the latest

    def add(self, job: int) -> int:
        """The number by which a job is called; its own until it has run, or for good where a graph calls it."""
        return self._thread.add(job)

    def launch(self, job: int) -> None:
        """Put a job into the current stream, which is the only one that may call."""
        from tessera_kernels.triton_crossing import call

        call(self.word, self.add(job))


def _end(thread: Any, on_gpu: bool) -> None:
    """Stop a bell's thread, behind what a stream still calls for: its kernels would wait for ever."""
    try:
        if on_gpu:
            torch.cuda.synchronize()
    finally:
        thread.stop()


def available(dtype: torch.dtype) -> bool:
    """Whether rows of this type can be mapped here."""
    return dtype in OPS


def encode(
    crossing: Crossing, cos_sin: torch.Tensor, maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor], heads: int,
    device: torch.device, bell: Bell | None = None,
) -> None:  # fmt: skip
    """Launch head_maps.encode_store's arithmetic: came (N, (H + 2G) * D) of the type of goes or float32, goes the same
    shape: q, k and v of a token one behind the other. cos_sin (P, 2, D/2) float32; maps as there."""
    came, goes, positions, tables, own = crossing
    one, (groups, dim) = maps[0], maps[0].shape[1:3]
    launch(OPS[goes.dtype].encode_job(
        came.data_ptr(), goes.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), tables.data_ptr(), own.data_ptr(),
        *(each.data_ptr() for each in maps), one.dim() == 4, one.shape[0], one.stride(0), came.shape[0], heads, groups,
        dim, cos_sin.shape[0], came.dtype is torch.float32 is not goes.dtype, not recording(device)),
        device, bell)  # fmt: skip


def decode(
    crossing: Crossing, out_map: torch.Tensor, heads: int, device: torch.device, bell: Bell | None = None
) -> None:
    """Launch head_maps.decode's arithmetic: came and goes (N, H * D)."""
    came, goes, _, tables, _ = crossing
    launch(OPS[goes.dtype].decode_job(
        came.data_ptr(), goes.data_ptr(), tables.data_ptr(), out_map.data_ptr(), out_map.dim() == 4, out_map.shape[0],
        out_map.stride(0), came.shape[0], heads, *out_map.shape[1:3], not recording(device)), device,
        bell)  # fmt: skip


def copy(to: torch.Tensor, source: torch.Tensor | None, device: torch.device) -> None:
    """Launch a copy within host memory, or zeros. Both contiguous; not to be recorded."""
    launch(native.extension().copy_job(to.data_ptr(), 0 if source is None else source.data_ptr(), to.nbytes), device)


def recording(device: torch.device) -> bool:
    """Whether what is launched now goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(job: int, device: torch.device, bell: Bell | None = None) -> None:
    """Put a job into the device's current stream; at once where the device is a CPU. Raises RuntimeError."""
    extension = native.extension()
    if device.type == "cpu":
        extension.run_job(job)
        return
    if bell is not None:
        bell.launch(job)
        return
    stream, function, driver = torch.cuda.current_stream(device).cuda_stream, extension.job_function(), _driver()
    status = driver.cuLaunchHostFunc(stream, function, job)
    if status == INVALID_CONTEXT:  # this thread has not called the device before
        _bind(driver, device)
        status = driver.cuLaunchHostFunc(stream, function, job)
    if status:
        raise RuntimeError(f"cuLaunchHostFunc: CUDA error {status}")


def _bind(driver: ctypes.CDLL, device: torch.device) -> None:
    """Make the device's primary context, PyTorch's, this thread's; the reference is kept as long as the process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    number, context = ctypes.c_int(), ctypes.c_void_p()
    status = (driver.cuDeviceGet(ctypes.byref(number), index)
              or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
              or driver.cuCtxSetCurrent(context))  # fmt: skip
    if status:
        raise RuntimeError(f"the context of {device} cannot be used by this thread: CUDA error {status}")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cuDeviceGet.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    library.cuDevicePrimaryCtxRetain.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library
