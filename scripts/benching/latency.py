"""latency: one request at a time, nothing else running: time to its first token, between tokens, tokens a second."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scripts.benching.ceilings import decode_floor_s, prefill_floor_s, request_floor_s
from scripts.benching.drive import Run, repeat
from scripts.benching.engines import Opened, add_model_flags, opened
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.metrics import latency
from scripts.benching.options import add_run_flags, add_workload_flags, report_of, workloads_of
from scripts.benching.workloads import Workload


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    add_workload_flags(parser, "single_stream")
    add_run_flags(parser, 5)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure. Returns 0. Raises ValueError for a workload of several requests."""
    workloads = workloads_of(args)
    for workload in workloads:
        if len(workload.items) != 1:
            raise ValueError(f"{workload.name} has {len(workload.items)} requests and latency takes one at a time; use "
                             "single_stream or 1xI+O, or scripts.bench serve")
    with opened(args, rest) as engine:
        report = report_of(args, engine)
        for workload in workloads:
            engine.check_fits(workload)
            runs = repeat(engine.loop, workload, engine.spec.vocab, args.runs)
            report.records.append(record_of(workload, runs, engine))
    finish(report, args.json)
    return 0


def record_of(workload: Workload, runs: Sequence[Run], engine: Opened) -> Record:
    """Times in milliseconds beside what one request alone must take."""
    (item,) = workload.items
    costs, device = engine.costs, engine.device
    ttft_s = prefill_floor_s(costs, device, item.prompt_tokens)
    tbt_s = decode_floor_s(costs, device, 1, item.prompt_tokens + item.output_tokens / 2)
    found = [latency(run.timelines) for run in runs]
    rate = item.output_tokens / request_floor_s(costs, device, item)
    figures = [
        Figure("out_tok_s", "tok/s", tuple(item.output_tokens / run.seconds for run in runs), True, rate),
        Figure("ttft", "ms", tuple(1e3 * one.ttft_p50_s for one in found), False, 1e3 * ttft_s),
    ]
    if item.output_tokens > 1:
        figures += [
            Figure("tbt_p50", "ms", tuple(1e3 * one.tbt_p50_s for one in found), False, 1e3 * tbt_s),
            Figure("tbt_p99", "ms", tuple(1e3 * one.tbt_p99_s for one in found), False, 1e3 * tbt_s),
            Figure("tbt_max", "ms", tuple(1e3 * one.tbt_max_s for one in found), False, 1e3 * tbt_s),
        ]
    details = {"distinct_tokens": [run.distinct_tokens for run in runs]}
    return Record(workload.name, tuple(figures), details=details)
