"""Where and how a benchmark ran: machine, versions, commit, command line. Written beside every figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import __version__
from engine.core.clock import wall_s

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "fa3-fwd", "flash-attn", "flashinfer-python", "transformers", "numpy")


def said(*command: str) -> str | None:
    """What a command printed, or None where it is not there or failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """Everything but the engine's settings, which each record's command adds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    travelled = os.environ.get("TESSERA_COMMIT")  # of a tree that was copied without its history
    changed = None if travelled else said("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "unix_s": int(wall_s()),
        "command_line": shlex.join(["python", "-m", f"scripts.{script}", *argv]),
        "commit": travelled or said("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "tessera": __version__,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def heading(script: str, workload: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """How a file of results begins that is no Report. workload: what is run, in short; argv: None = this process's."""
    where = environment(script, sys.argv[1:] if argv is None else argv)
    return {"workload": workload, "command": where["command_line"], "commit": where["commit"], "environment": where}
