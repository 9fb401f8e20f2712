"""`make check`: everything that can be said about the tree without running it. Exit status 1 if anything is said.

ruff, mypy (strict on engine/core), then the project's own rules of scripts/lints.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.lints import Tree

ROOT = Path(__file__).resolve().parent.parent
LINTS = ("calls", "floors", "manifests", "words", "links", "habits")
TOOLS = {
    "ruff": ["ruff", "check", "--quiet", "--output-format", "concise", "."],
    "mypy --strict engine/core": ["mypy", "--strict", "--no-error-summary", "--follow-imports", "silent",
                                  "--cache-dir", ".mypy_cache/strict", "engine/core"],
    "mypy": ["mypy", "--no-error-summary", "--cache-dir", ".mypy_cache/plain", "engine", "vattention_ext", "scripts",
             "setup.py"],
}  # fmt: skip


def run_tool(name: str) -> list[str]:
    """The complaints of an outside tool, as it prints them."""
    done = subprocess.run([sys.executable, "-m", *TOOLS[name]], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    return (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]


def run_lint(name: str) -> list[str]:
    """The complaints of one file of scripts/lints."""
    offences: list[str] = importlib.import_module(f"scripts.lints.{name}").offences(Tree(ROOT))
    return offences


def main() -> int:
    """Run the named checks, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help=f"of: {', '.join((*TOOLS, *LINTS))}")
    only = parser.parse_args().only
    checks = {name: run_tool for name in TOOLS} | {name: run_lint for name in LINTS}
    if unknown := set(only) - set(checks):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(checks)}")
    chosen = [name for name in checks if not only or name in only]
    said = 0
    with ThreadPoolExecutor(2) as pool:
        for name, lines in zip(chosen, pool.map(lambda name: checks[name](name), chosen)):
            print(f"{name}: {'ok' if not lines else f'{len(lines)} lines'}", flush=True)
            for line in lines:
                print(f"  {line}")
            said += len(lines)
    return 1 if said else 0


if __name__ == "__main__":
    raise SystemExit(main())
