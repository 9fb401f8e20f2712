"""The picture of docs/experiments/scx.md from its JSON files: `python -m scripts.draw_scx FILES`.

A row for each record of `scripts.bench scx` (throughput) or `scripts.scx accuracy`; throughput of one model on one kind
of machine is one row, whatever the number of its records. It computes nothing but what stands in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "scx.svg"
COLOURS = ("#7a8ba8", "#e8b4a8", "#c8553d", "#7b3f61")


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.draw_scx", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    found = joined([json.loads(path.read_text("utf-8")) for path in args.results])
    figure = Figure(figsize=(11, 3.2 * len(found)), layout="constrained")
    FigureCanvasSVG(figure)
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), record in zip(rows, found, strict=True):
        if record.get("command") == "scx":
            draw_throughput(left, right, record)
        else:
            draw_accuracy(left, right, record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


def joined(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of throughput that are of one model and machine as one, its cells by lengths."""
    found: dict[Any, dict[str, Any]] = {}
    for i, record in enumerate(records):
        if record.get("command") != "scx":
            found[i] = record
            continue
        environment = record["environment"]
        kind = environment["model"], (environment["gpu"] or environment["cpu"]).split(",")[0]
        one = found.setdefault(kind, {**record, "records": [], "kind": ", ".join(kind)})
        one["records"] = sorted([*one["records"], *record["records"]], key=lambda cell: lengths_of(cell["workload"]))
    return list(found.values())


def lengths_of(workload: str) -> tuple[int, int]:
    """`8x1024+512` to (1024, 512)."""
    prompt, output = workload.split("x")[1].split("+")
    return int(prompt), int(output)


def draw_throughput(left: Any, right: Any, record: dict[str, Any]) -> None:
    """Output tokens a second by cell and variant; encoded variants' share of plain."""
    cells = list(dict.fromkeys(one["workload"] for one in record["records"]))
    variants = list(dict.fromkeys(one["variant"] for one in record["records"]))
    places = {(one["workload"], one["variant"]): {figure["name"]: figure for figure in one["figures"]}
              for one in record["records"]}  # fmt: skip
    for axes, name, shown in ((left, "out_tok_s", variants), (right, "of_plain", variants[1:])):
        width = 0.8 / max(1, len(shown))
        for number, variant in enumerate(shown):
            for at, cell in enumerate(cells):
                figure = places.get((cell, variant), {}).get(name)
                if figure is None:
                    continue
                median, runs = figure["median"], figure["runs"]
                x = at + (number - (len(shown) - 1) / 2) * width
                axes.bar(x, median, width, yerr=[[median - min(runs)], [max(runs) - median]], capsize=2,
                         color=COLOURS[variants.index(variant) % len(COLOURS)], label=variant if at == 0 else None)
        axes.set_xticks(range(len(cells)), cells, fontsize=7, rotation=20 if len(cells) < 9 else 60)
        axes.tick_params(axis="y", labelsize=8)
        axes.legend(fontsize=7)
    right.axhline(1, color=COLOURS[0], linewidth=1.5)
    left.set_ylabel(record["kind"], fontsize=8)
    left.set_title("output tokens a second (requests x prompt + output)", fontsize=9)
    right.set_title("of plain", fontsize=9)


def draw_accuracy(left: Any, right: Any, record: dict[str, Any]) -> None:
    """What schemes add to the bits of a token, and their cloze accuracy, with intervals."""
    schemes = record["schemes"]
    names = [name for name in schemes if name != "plain"]
    panels = ((left, names, "bits_a_token_over_plain", 1.0), (right, list(schemes), "cloze", 100.0))
    for axes, keys, key, scale in panels:
        interval = "bits_over_plain_interval" if axes is left else "cloze_interval"
        for at, name in enumerate(keys):
            value, (low, high) = scale * schemes[name][key], (scale * end for end in schemes[name][interval])
            axes.errorbar(at, value, [[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", capsize=4,
                          color=COLOURS[2] if name != "plain" else COLOURS[0])  # fmt: skip
        axes.set_xticks(range(len(keys)), keys, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(x=0.3)
    left.axhline(0, color=COLOURS[0], linewidth=1.5)
    left.set_ylabel(f"{record['workload'].removeprefix('scx-accuracy-')}, {record['dtype']}", fontsize=8)
    left.set_title("bits a token over plain (0 = the same)", fontsize=9)
    right.set_title("cloze: per cent right", fontsize=9)


if __name__ == "__main__":
    main()
