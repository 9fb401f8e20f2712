"""Section of scripts.gpu_kernels: the products' algorithms under sustained load, where the GPU is held by its power.

For a few milliseconds an H200 multiplies at 1,980 MHz; within a fifth of a second its 700 W hold it at about 1,400, and
then the algorithm that moves the fewest bytes for a product wins over the one that was fastest at first. Steps of
prompts load it so for as long as prompts wait. Candidates take turns, so what the chip does meanwhile is shared.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from scripts.gpu_library import neighbours
from scripts.gpu_timing import Call, graph_of, graph_us, show
from scripts.gpu_variants import PRODUCTS, weights_of
from tessera_kernels import cublaslt

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

BF16 = torch.bfloat16
ROWS = (512, 640, 768, 896, 1024, 1152, 1280, 8192)  # steps with prompts
NEAR = 1.08  # candidates: at first at most so many times as slow as the fastest
MOST = 6
WIDE_ROWS, WIDE = (1024, 1152), 16  # sizes whose neighbours of the proposals are tried too, and how many of them
TURN_S, COUNTED_S = 0.22, 0.12  # a candidate's turn, and the part of it at its end that counts
WARM_S = 0.4


def sustained(s: Session) -> None:
    """Every product's near-best proposals, in turns; the table gets the one with the highest rate under load."""
    if s.compile_only or cublaslt.version() is None:
        return
    table: dict[str, Any] = s.report.settings.setdefault("library", {"version": cublaslt.version(), "ranks": {}})
    for name, (out, width, gated) in PRODUCTS.items():
        if name == "head":
            continue
        rows = out * 2 if gated else out
        weights = weights_of(s, name)
        for m in ROWS[:: 4 if s.quick else 1]:
            x, onto = s.normal(m, width), s.normal(m, rows) if name in ("o", "down") else None
            product = cublaslt.product(m, rows, width, BF16, BF16)
            if not product.proposals:
                continue

            def call(i: int, choice: cublaslt.Choice, w=weights, x=x, onto=onto) -> object:
                return cublaslt.matmul(x, w[i], choice, add_to=onto)

            known: list[cublaslt.Choice] = list(range(len(product.proposals)))
            kept = table["ranks"].get(f"{rows}x{width}", {}).get(str(m))
            known += [tuple(kept)] if isinstance(kept, list) else []
            wide = m in WIDE_ROWS and name in ("gate_up", "down") and not s.quick
            if wide:  # the largest products of the steps that a crowd makes
                known += [one for one in neighbours(product, call, len(weights))[:WIDE] if one not in known]
            at_first = {choice: graph_us(partial(call, choice=choice), len(weights), calls=8, target_ms=2.0)
                        for choice in known}  # fmt: skip
            close = sorted(known, key=lambda choice: at_first[choice])
            close = [one for one in close if at_first[one] <= NEAR * at_first[close[0]]][: MOST + WIDE * wide]
            times = _in_turns({one: partial(call, choice=one) for one in close}, len(weights), at_first)
            flops, shape = 2.0 * m * rows * width, f"{name} M={m}"
            for one in sorted(times, key=lambda one: times[one])[:2]:
                s.report.add("sustained", shape, f"{one} (at first {at_first[one]:.1f} us)", times[one], 0, flops)
            taken = tuple(kept) if isinstance(kept, list) else 0 if kept is None else kept
            if taken in times:
                s.report.add("sustained", shape, f"* the table's, {taken}", times[taken], 0, flops)
            show([row for row in s.report.rows if row.section == "sustained" and row.shape == shape])
            best = min(times, key=lambda one: times[one])
            if times[best] < 0.995 * times.get(taken, math.inf):
                found = list(best) if isinstance(best, tuple) else best
                table["ranks"].setdefault(f"{rows}x{width}", {})[str(m)] = found
        del weights
    cublaslt.forget_table()


def _in_turns(calls: dict[Any, Call], buffers: int, at_first: dict[Any, float]) -> dict[Any, float]:
    """Microseconds of a call at the end of its turns, by candidate; a second round runs backwards."""
    graphs = {name: graph_of(call, buffers, 8) for name, call in calls.items()}
    first = next(iter(graphs))
    _run(graphs[first], WARM_S, 0.1, at_first[first])
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for names in (list(graphs), list(graphs)[::-1]):
        for name in names:
            times[name].append(_run(graphs[name], TURN_S, COUNTED_S, at_first[name]) / 8)
    return {name: sum(found) / len(found) for name, found in times.items()}


def _run(graph: torch.cuda.CUDAGraph, seconds: float, counted_s: float, call_us: float) -> float:
    """Replay for so long; the mean microseconds of a replay in the last part."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    each_s = 8 * call_us / 1e6
    before, counted = int((seconds - counted_s) / each_s), max(1, int(counted_s / each_s))
    for _ in range(before):
        graph.replay()
    begin.record()
    for _ in range(counted):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / counted
