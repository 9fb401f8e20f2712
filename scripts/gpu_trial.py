"""How a section of scripts.gpu_kernels tries variants: inputs, compiling side by side, timing, what the table shows.

It knows no kernel and no shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from scripts.gpu_timing import Call, Report, compiling_only, graph_us, show

BF16 = torch.bfloat16


class Session:
    """The report, the device, and how variants are tried."""

    def __init__(self, report: Report, device: str, *, compile_only: bool, quick: bool, workers: int) -> None:
        self.report, self.device, self.compile_only = report, device, compile_only
        self.quick, self.workers = quick, workers

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
        """Random values on the device; without them where nothing runs."""
        empty = torch.empty(shape, dtype=dtype, device=self.device)
        return empty if self.compile_only else empty.normal_(std=scale)

    def ints(self, values: list[int]) -> torch.Tensor:
        """(len,) int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def compile(self, calls: list[Callable[[], object]]) -> None:
        """Build what these calls launch, side by side."""
        began = time.perf_counter()
        errors: list[BaseException] = []
        try:
            with compiling_only(self.workers, errors):
                for call in calls:
                    try:
                        call()
                    except Exception as error:  # a variant that cannot be built is reported when it is timed
                        if self.compile_only:
                            self.report.fail("compile", error)
        except Exception as error:
            self.report.fail("compiling side by side", error)
        for failed in errors:
            self.report.fail("compile", failed)
        print(f"  {len(calls)} variants compiled in {time.perf_counter() - began:.1f} s", flush=True)

    def time(self, section: str, shape: str, variant: str, call: Call, buffers: int, *,
             nbytes: float = 0, flops: float = 0, calls: int = 0) -> float:  # fmt: skip
        """Time a variant and record it; infinity where it fails."""
        if self.compile_only:
            return math.inf
        try:
            us = graph_us(call, buffers, calls=calls, target_ms=8 if self.quick else 20)
        except Exception as error:
            self.report.fail(f"{section} {shape} {variant}", error)
            return math.inf
        self.report.add(section, shape, variant, us, nbytes, flops)
        return us

    def show_best(self, section: str, shape: str, ours: int = 3) -> None:
        """Print the fastest variants of a shape and every library row."""
        rows = [row for row in self.report.rows if (row.section, row.shape) == (section, shape)]
        mine = sorted((row for row in rows if not row.variant.startswith("*")), key=lambda row: row.us)
        show([*mine[:ours], *(row for row in rows if row.variant.startswith("*"))])
