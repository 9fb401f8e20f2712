"""compare A.json B.json: every figure that both reports have, as a ratio, with the noise of the repeats beside it.

A ratio above 1 is B being better, whichever way the figure counts. Noise is the spread of the repeats of both; a
single run has none to show, and says so. With --fail-below the exit status is 1 when a ratio is below that and the
difference is larger than the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benching.figures import columns, load, shown


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both reports. ratio: B over A, turned so that above 1 is better; noise: of both, None = unknown."""

    workload: str
    variant: str
    figure: str
    a: float
    b: float
    ratio: float
    noise: float | None

    @property
    def verdict(self) -> str:
        """What can be said: "better", "worse", "within noise", or only the ratio where there were no repeats."""
        if self.noise is None:
            return "no repeats"
        if abs(self.ratio - 1) <= self.noise:
            return "within noise"
        return "better" if self.ratio > 1 else "worse"

    def fails(self, below: float) -> bool:
        """Whether this is a regression beyond `below`."""
        return self.ratio < below and self.verdict != "within noise"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--fail-below", type=float, default=None, metavar="X", help="exit status 1 below this ratio")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the table. Returns 1 for a regression, else 0."""
    if rest:
        raise ValueError(f"argument {rest[0]!r} is not expected")
    a, b = load(args.a), load(args.b)
    if a["command"] != b["command"]:
        raise ValueError(f"{args.a} is of {a['command']}, {args.b} of {b['command']}; compare two of one command")
    found = changes(a, b)
    if not found:
        raise ValueError(f"{args.a} and {args.b} have no figure in common; were the workloads the same?")
    for line in differences(a["environment"], b["environment"]):
        print(line)
    rows = [("workload", "variant", "figure", "A", "B", "B better by", "noise", "verdict")]
    rows += [(c.workload, c.variant, c.figure, shown(c.a), shown(c.b), f"{c.ratio:.3f}x",
              "-" if c.noise is None else f"{100 * c.noise:.1f} %", c.verdict) for c in found]  # fmt: skip
    print(columns(rows))
    failed = [c for c in found if args.fail_below is not None and c.fails(args.fail_below)]
    for change in failed:
        print(f"regression: {change.workload} {change.variant} {change.figure}: {change.ratio:.3f} is below "
              f"{args.fail_below:g}")  # fmt: skip
    return 1 if failed else 0


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Figures of both reports, in A's order; those that only one has are left out."""
    others = {(r["workload"], r["variant"], f["name"]): f for r in b["records"] for f in r["figures"]}
    found = []
    for record in a["records"]:
        for mine in record["figures"]:
            theirs = others.get((record["workload"], record["variant"], mine["name"]))
            if theirs is None or not mine["median"] or not theirs["median"]:
                continue
            up = theirs["median"] / mine["median"]
            repeated = min(len(mine["runs"]), len(theirs["runs"])) > 1
            found.append(Change(
                record["workload"], record["variant"], f"{mine['name']} [{mine['unit']}]", mine["median"],
                theirs["median"], up if mine["higher_is_better"] else 1 / up,
                max(mine["noise"], theirs["noise"]) if repeated else None,
            ))  # fmt: skip
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is not the same about machine, versions and settings: reasons to mistrust a ratio."""
    lines = []
    for name in ("commit", "cpu", "cores", "gpu", "python", "versions", "model", "settings", "flags"):
        mine, theirs = a.get(name), b.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            lines += [f"differs: {name}.{key}: {mine.get(key)} / {theirs.get(key)}" for key in keys
                      if not (name == "settings" and key == "model")]  # fmt: skip
        elif mine != theirs:
            lines.append(f"differs: {name}: {mine} / {theirs}")
    return lines
