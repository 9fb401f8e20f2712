"""The picture of docs/benchmarks.md's online figures, from their records: `python -m scripts.draw_online`.

A panel for each rate: the p99 of the time to the first token against the p99 between tokens. A setting is a point; left
and down is better; the peer's settings are joined in the order of their token budgets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, OUT = ROOT / "benchmarks" / "results", ROOT / "docs" / "online.svg"
PEER, OURS = "#7a8ba8", "#c8553d"
RUNS = (("h200_online_{}", "o", "in process"), ("h200_first_gpu_online_{}", "v", "in process, the GPU of HTTP"),
        ("h200_second_gpu_online_{}", "s", "in process, a third GPU"),
        ("h200_slow_gpu_online_{}", "D", "in process, a slow GPU"), ("h200_http_{}", "^", "over HTTP"))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.draw_online", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    peer = json.loads((args.results / "peer_vllm_0.26_online.json").read_text("utf-8"))["points"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, rate in zip(figure.subplots(1, 2), (8, 12), strict=True):
        draw(axes, [point for point in peer if point["rate"] == rate])
        for name, marker, words in RUNS:
            file = args.results / f"{name.format(rate)}.json"
            if not file.is_file():  # not every GPU ran both rates
                continue
            found = medians(file)
            axes.plot(found["ttft_p99"], found["tbt_p99"], marker, color=OURS, label=f"Tessera, {words}", markersize=8,
                      markerfacecolor=OURS if marker == "o" else "white")  # fmt: skip
        axes.set_title(f"{rate} requests a second", fontsize=10)
    figure.axes[1].legend(fontsize=8)  # 12 a second has every run
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


def draw(axes: Any, points: list[dict[str, Any]]) -> None:
    """The peer's settings, and the axes."""
    axes.plot([one["ttft_p99"] for one in points], [one["tbt_p99"] for one in points], "D-", color=PEER,
              label="vLLM 0.26.0, by tokens a step")  # fmt: skip
    for one in points:
        axes.annotate(one["budget"], (one["ttft_p99"], one["tbt_p99"]), xytext=(7, 5), textcoords="offset points",
                      fontsize=8, color=PEER)  # fmt: skip
    for set_scale, ticks, set_ticks in ((axes.set_xscale, (350, 400, 500, 600, 1000, 2000, 4000), axes.set_xticks),
                                        (axes.set_yscale, (10, 20, 35, 60, 100, 250), axes.set_yticks)):  # fmt: skip
        set_scale("log")
        set_ticks(ticks, [str(tick) for tick in ticks])
        set_ticks([], minor=True)
    axes.set_ylim(10, 350)
    axes.grid(alpha=0.3)
    axes.set_xlabel("time to first token, p99 [ms]", fontsize=9)
    axes.set_ylabel("time between tokens, p99 [ms]", fontsize=9)


def medians(path: Path) -> dict[str, float]:
    """The figures of a record of `scripts.bench serve`."""
    (record,) = json.loads(path.read_text("utf-8"))["records"]
    return {figure["name"]: figure["median"] for figure in record["figures"]}


if __name__ == "__main__":
    main()
