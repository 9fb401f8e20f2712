"""What a benchmark reports: figures with their repeats and ceilings, in records, in one report; JSON and a table.

It does not know what was measured. The JSON is what `scripts.bench compare` reads.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = "tessera-bench-1"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, measured `len(runs)` times. ceiling: what the machine allows at most (or, for times, at least)."""

    name: str
    unit: str
    runs: tuple[float, ...]
    higher_is_better: bool
    ceiling: float | None = None

    @property
    def median(self) -> float:
        """Of the runs."""
        return statistics.median(self.runs)

    @property
    def noise(self) -> float:
        """(highest - lowest) / median; 0 for a single run, which tells nothing of its noise."""
        return (max(self.runs) - min(self.runs)) / self.median if self.median else 0.0

    @property
    def of_ceiling(self) -> float | None:
        """Median over ceiling, for times ceiling over median: 1 is all that the machine allows."""
        if not self.ceiling or not self.median:
            return None
        return self.median / self.ceiling if self.higher_is_better else self.ceiling / self.median

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the runs."""
        derived = {"median": self.median, "noise": self.noise, "of_ceiling": self.of_ceiling}
        return {**asdict(self), **derived}


@dataclass(frozen=True, slots=True)
class Record:
    """Figures of one workload and one variant ("" where there is only one). details: whatever else is worth keeping."""

    workload: str
    figures: tuple[Figure, ...]
    variant: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """Everything one command found."""

    command: str
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        records = [{"workload": r.workload, "variant": r.variant, "figures": [f.as_dict() for f in r.figures],
                    "details": r.details} for r in self.records]  # fmt: skip
        return {"format": FORMAT, "command": self.command, "environment": self.environment,
                "ceilings": self.ceilings, "records": records}  # fmt: skip


def shown(value: float) -> str:
    """Three or four significant digits, thousands with commas."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def table(records: Sequence[Record]) -> str:
    """One line a figure: median, spread, and the ceiling with how much of it was reached."""
    head = ("workload", "variant", "figure", "median", "low - high", "ceiling", "reached")
    rows = [head]
    for record in records:
        for figure in record.figures:
            part = figure.of_ceiling
            many = len(figure.runs) > 1
            rows.append((
                record.workload, record.variant, f"{figure.name} [{figure.unit}]", shown(figure.median),
                f"{shown(min(figure.runs))} - {shown(max(figure.runs))}" if many else "one run",
                shown(figure.ceiling) if figure.ceiling else "-", f"{100 * part:.1f} %" if part is not None else "-",
            ))  # fmt: skip
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a first row of titles; columns without content are left out."""
    keep = [i for i in range(len(rows[0])) if any(row[i] not in ("", "-") for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in keep}
    return "\n".join("  ".join(f"{row[i]:<{widths[i]}}" for i in keep).rstrip() for row in rows)


def finish(report: Report, path: Path | None) -> None:
    """Print the table and, as the last line, the whole report in JSON; write that to `path`, too."""
    print("\n" + table(report.records), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    print(json.dumps(report.as_dict()))


def load(path: Path) -> dict[str, Any]:
    """A report written by finish(). Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: is no report of this program (format {FORMAT}); run the benchmark again")
    return found
