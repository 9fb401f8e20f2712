"""How scripts.gpu_kernels measures: graphs of many calls over rotating buffers, variants compiled side by side.

It knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scripts.benching.ceilings import measure_device

Call = Callable[[int], object]  # one call on buffer number i


@dataclass(frozen=True, slots=True)
class Row:
    """One measured variant. percent: of the ceiling that binds it (bytes or products)."""

    section: str
    shape: str
    variant: str
    us: float
    gbytes_s: float = 0.0
    tflops_s: float = 0.0
    percent: float = 0.0


@dataclass(slots=True)
class Report:
    """What was measured, what failed, and what was chosen."""

    copy_gbytes_s: float
    product_tflops_s: float
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, shape: str, variant: str, us: float, nbytes: float = 0, flops: float = 0) -> Row:
        """Record a time; the ceiling is the longer of bytes over copy speed and products over matrix speed."""
        floor_us = max(nbytes / self.copy_gbytes_s / 1e3, flops / self.product_tflops_s / 1e6)
        row = Row(section, shape, variant, round(us, 2), round(nbytes / us / 1e3, 1), round(flops / us / 1e6, 1),
                  round(100 * floor_us / us, 1))  # fmt: skip
        self.rows.append(row)
        return row

    def fail(self, what: str, error: BaseException) -> None:
        """Record a variant that did not run by the first line of its error."""
        line = (str(error).strip().splitlines() or [""])[0][:160]
        self.failures.append(f"{what}: {type(error).__name__}: {line}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"copy_gbytes_s": self.copy_gbytes_s, "product_tflops_s": self.product_tflops_s,
                "settings": self.settings, "rows": [asdict(row) for row in self.rows],
                "failures": self.failures}  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """A table."""
    for row in rows:
        print(f"{row.section:9} {row.shape:30} {row.variant:46} {row.us:10.2f} us {row.gbytes_s:8.0f} GB/s "
              f"{row.tflops_s:7.1f} TFLOP/s {row.percent:5.1f} %", flush=True)  # fmt: skip


def graph_of(call: Call, buffers: int, calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls over buffers 0.., which were called outside of it before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(2, calls)):
            call(i % buffers)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % buffers)
    return graph


def graph_us(call: Call, buffers: int, *, calls: int = 0, target_ms: float = 25.0) -> float:
    """Median time of one call in microseconds: a CUDA graph of calls over buffers 0.., replayed."""
    calls = calls or max(buffers, 4)
    graph = graph_of(call, buffers, calls)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    repeats = int(min(20, max(3, target_ms / max(start.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


@contextlib.contextmanager
def compiling_only(workers: int, errors: list[BaseException]) -> Iterator[None]:
    """Inside, launches compile on `workers` threads and run nothing; leaving waits for all and fills `errors`."""
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        return original(self, *args, **{**options, "warmup": True})

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True) as mode:
            yield
        errors += [error for future in mode.raw_futures if (error := future.exception())]
    finally:
        JITFunction.run = original


class _Sm90:
    """What Triton asks of a driver to compile, on a machine without a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend_sm90() -> None:
    """From here on Triton compiles for an H200; nothing can run."""
    from triton.runtime import driver

    driver.set_active(_Sm90())


def ceilings() -> tuple[float, float]:
    """(GB/s of a large copy, bytes read and written; TFLOP/s of a large bf16 product on random data).

    Not in a graph: there a copy becomes a memcpy node, which reached two thirds of the bytes of the same copy outside.
    """
    device = measure_device("cuda", "bfloat16")
    return device.bytes_s / 1e9, device.product_flop_s / 1e12
