"""Sections of scripts.gpu_kernels about the vendor's products: cuBLASLt's fastest algorithm for each number of rows.

Shapes are those of the model's products, rows those that the engine pads steps to. What wins goes into the settings,
where kernels/cublaslt.py finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from engine.runner.graphs import graph_sizes
from engine.runner.pieces import piece_sizes
from scripts.gpu_timing import Call, graph_us, show
from scripts.gpu_variants import PRODUCTS, weights_of
from tessera_kernels import cublaslt
from tessera_kernels.triton_silu_mul import silu_mul

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

BF16 = torch.bfloat16
LIBRARY_ROWS = [m for m in sorted({*graph_sizes(512), *piece_sizes(4096), 8192}) if m >= 16]


def library(s: Session) -> None:
    """Every proposal of cuBLASLt for every number of rows that the engine pads to, PyTorch's own call beside them; the
    table gets the fastest where it wins by 1 %."""
    if s.compile_only:
        return
    if cublaslt.version() is None:
        print("  cuBLASLt cannot be used here", flush=True)
        return
    ranks: dict[str, dict[str, cublaslt.Choice]] = {}
    for name, (out, width, gated) in PRODUCTS.items():
        rows = out * 2 if gated else out
        weights = weights_of(s, name)
        for m in LIBRARY_ROWS[:: 4 if s.quick else 1]:
            if name == "head" and m > 512:
                continue
            x, add = s.normal(m, width), name in ("o", "down")
            onto = s.normal(m, rows) if add else None
            float_out = name == "head"
            product = cublaslt.product(m, rows, width, BF16, torch.float32 if float_out else BF16)

            def ours(i: int, rank: int, w=weights, x=x, onto=onto, float_out=float_out) -> object:
                return cublaslt.matmul(x, w[i], rank, add_to=onto, float_out=float_out)

            def theirs(i: int, w=weights, x=x, onto=onto, float_out=float_out) -> object:
                if onto is not None:
                    return onto.addmm_(x, w[i].t())
                return torch.mm(x, w[i].t(), out_dtype=torch.float32) if float_out else F.linear(x, w[i])

            options: dict[str, Any] = {"calls": 8, "target_ms": 4.0}
            library_us = graph_us(theirs, len(weights), **options)
            times = [graph_us(partial(ours, rank=rank), len(weights), **options)
                     for rank in range(len(product.proposals))]  # fmt: skip
            if not times:
                continue
            best_us = min(times)
            nbytes, flops = weights[0].numel() * 2 + m * (width + rows) * 2, 2.0 * m * rows * width
            for variant, us in (("* PyTorch's call", library_us), (f"proposal {times.index(best_us)}", best_us)):
                s.report.add("library", f"{name} M={m}", variant, us, nbytes, flops)
            if best_us < 0.99 * library_us:
                ranks.setdefault(f"{rows}x{width}", {})[str(m)] = times.index(best_us)
        del weights
        won = [row for row in s.report.rows if row.section == "library" and row.shape.startswith(f"{name} ")]
        gains = [theirs.us / ours.us for theirs, ours in zip(won[::2], won[1::2], strict=True)]
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        print(f"  {name}: the best proposal is {mean:.3f} times as fast as PyTorch's call (geometric mean over "
              f"{len(gains)} sizes; at most {max(gains):.2f})", flush=True)  # fmt: skip
    s.report.settings["library"] = {"version": cublaslt.version(), "ranks": ranks}
    cublaslt.forget_table()


SHOWN_ROWS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)


def products(s: Session) -> None:
    """Each product as the engine runs it, with the SiLU or sum that its kernel takes along, beside PyTorch's call of
    cuBLAS with what it leaves to other kernels; nothing is chosen here. Parts of a product that was cut along K are
    summed by the operation behind it, which is not in the time."""
    from engine.parts.cuda_kernels import CudaKernels

    kernels = CudaKernels()
    for name, (out, width, gated) in PRODUCTS.items():
        rows = out * 2 if gated else out
        weights = weights_of(s, name)
        linears: list[Any] = [
            kernels.gated_linear(w[:out], w[out:]) if gated else kernels.linear(w, wide=name == "head") for w in weights
        ]
        for m in SHOWN_ROWS:
            if name == "head" and m > 512:
                continue
            x, onto = s.normal(m, width), s.normal(m, out)
            added: dict[str, Any] = {"add_to": onto} if name in ("o", "down") else {}

            def ours(i: int, x=x, linears=linears, added=added, cut=name in ("qkv", "o")) -> object:
                parts = linears[i].parts(x) if cut else None
                return linears[i](x, **added) if parts is None else parts

            def theirs(i: int, x=x, w=weights, onto=onto, name=name, gated=gated) -> object:
                if name in ("o", "down"):
                    return onto.addmm_(x, w[i].t(), beta=0.5)
                if name == "head":
                    return torch.mm(x, w[i].t(), out_dtype=torch.float32)
                return silu_mul(F.linear(x, w[i])) if gated else F.linear(x, w[i])

            s.compile([partial(ours, 0)])
            numbers: dict[str, Any] = {"nbytes": weights[0].numel() * 2 + m * (width + rows) * 2,
                                       "flops": 2.0 * m * rows * width, "calls": 8}  # fmt: skip
            s.time("products", f"{name} M={m}", "the engine's", ours, len(weights), **numbers)
            s.time("products", f"{name} M={m}", "* PyTorch's cuBLAS", theirs, len(weights), **numbers)
            s.show_best("products", f"{name} M={m}")
        del weights, linears


SEARCHED = (128, 192, 256, 320, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048)
KEPT = 12  # variants of a first, rough timing that are timed well


def search(s: Session) -> None:
    """Algorithms beyond what cuBLASLt proposes: other tiles, clusters and custom options of the same kernels. The table
    gets one where it beats the best proposal by 1 %."""
    if s.compile_only or cublaslt.version() is None:
        return
    table: dict[str, Any] = s.report.settings.setdefault("library", {"version": cublaslt.version(), "ranks": {}})
    for name, (out, width, gated) in PRODUCTS.items():
        rows = out * 2 if gated else out
        weights = weights_of(s, name)
        for m in SEARCHED[:: 3 if s.quick else 1] if name != "head" else (256,):
            x, float_out = s.normal(m, width), name == "head"
            onto = s.normal(m, rows) if name in ("o", "down") else None
            product = cublaslt.product(m, rows, width, BF16, torch.float32 if float_out else BF16)
            if not product.proposals:
                continue

            def call(i: int, choice: cublaslt.Choice, w=weights, x=x, onto=onto, float_out=float_out) -> object:
                return cublaslt.matmul(x, w[i], choice, add_to=onto, float_out=float_out)

            tried = neighbours(product, call, len(weights))
            options: dict[str, Any] = {"calls": 8, "target_ms": 4.0}
            times: dict[cublaslt.Choice, float] = {}
            for choice in [*range(len(product.proposals)), *tried[:KEPT]]:
                times[choice] = graph_us(partial(call, choice=choice), len(weights), **options)
            proposed = min(times[choice] for choice in range(len(product.proposals)))
            best = min(times, key=lambda choice: times[choice])
            nbytes, flops = weights[0].numel() * 2 + m * (width + rows) * 2, 2.0 * m * rows * width
            s.report.add("search", f"{name} M={m}", "* best proposal", proposed, nbytes, flops)
            s.report.add("search", f"{name} M={m}", f"best of {len(tried)}: {best}", times[best], nbytes, flops)
            show(s.report.rows[-2:])
            if isinstance(best, tuple) and times[best] < 0.99 * proposed:
                table["ranks"].setdefault(f"{rows}x{width}", {})[str(m)] = list(best)
        del weights
    cublaslt.forget_table()


# attributes of cublasLtMatmulAlgoConfigAttributes_t, and one of ...CapAttributes_t: the tiles that an algorithm knows
_TILE, _SPLIT, _SCHEME, _CUSTOM, _CLUSTER = 1, 2, 3, 5, 8
_CAN_TILES = 6


def neighbours(product: cublaslt.Product, call: Callable[[int, cublaslt.Choice], object], buffers: int
               ) -> list[cublaslt.Choice]:  # fmt: skip
    """Algorithms beyond the proposals, whole along K: other tiles, clusters and custom options of the first. Those that
    can run, the fastest first, roughly."""
    known = [_settings(product, one) for one in product.proposals]
    clusters, customs = sorted({one[_CLUSTER] for one in known}), range(max(one[_CUSTOM] for one in known) + 2)
    found: list[cublaslt.Choice] = []
    for tile, cluster, custom in itertools.product(_tiles(product, product.proposals[0]), clusters, customs):
        changed = list(known[0])
        changed[_TILE], changed[_SPLIT], changed[_SCHEME] = tile, 1, 0
        changed[_CUSTOM], changed[_CLUSTER] = custom, cluster
        with contextlib.suppress(cublaslt.LibraryError):
            product.algorithm(tuple(changed))
            found.append(tuple(changed))
    return sorted(found, key=lambda choice: _roughly_us(lambda i: call(i, choice), buffers))


def _settings(product: cublaslt.Product, proposal: Any) -> tuple[int, ...]:
    """The numbers that make a proposal."""
    found = []
    for number, size in cublaslt.SETTINGS.items():
        value, written = ctypes.c_int32(0), ctypes.c_size_t(0)
        cublaslt.check(product.calls.cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(proposal), number, ctypes.byref(value), ctypes.c_size_t(size), ctypes.byref(written),
        ), "cublasLtMatmulAlgoConfigGetAttribute")  # fmt: skip
        found.append(value.value)
    return tuple(found)


def _tiles(product: cublaslt.Product, proposal: Any) -> list[int]:
    """The numbers of the tiles that the algorithm of a proposal knows."""
    written, room = ctypes.c_size_t(0), (ctypes.c_uint32 * 1024)()
    cublaslt.check(product.calls.cublasLtMatmulAlgoCapGetAttribute(
        ctypes.byref(proposal), _CAN_TILES, room, ctypes.c_size_t(ctypes.sizeof(room)), ctypes.byref(written),
    ), "cublasLtMatmulAlgoCapGetAttribute")  # fmt: skip
    return list(room[: written.value // 4])


def _roughly_us(call: Call, buffers: int) -> float:
    """One call by events, after another; infinity where it fails."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        call(0)
        begin.record()
        call(1 % buffers)
        end.record()
        end.synchronize()
    except cublaslt.LibraryError:
        return math.inf
    return begin.elapsed_time(end) * 1e3
