"""The picture of docs/experiments/adaptivocab.md from its JSON files: `python -m scripts.draw_vocabulary FILES`.

It draws what `scripts.vocabulary_experiment` wrote and computes nothing but ratios. Files of one domain, from
several devices, make one row; of the first that has them its bits per byte are drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "adaptivocab.svg"
PLAIN, PATCHED, OTHER = "#7a8ba8", "#c8553d", "#d9d9d9"
DEVICES = {"cuda": (PATCHED, "GPU"), "cpu": ("#e0a050", "CPU")}
MODELS = {"untouched": OTHER, "plain, tuned": PLAIN, "patched, not tuned": "#e8b4a8", "patched, tuned": PATCHED}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.draw_vocabulary", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of scripts.vocabulary_experiment")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for path in args.results:
        result = json.loads(path.read_text("utf-8"))
        found.setdefault(result["workload"].removeprefix("adaptivocab-"), []).append(result)
    figure = Figure(figsize=(11, 3.4 * len(found)), layout="constrained")
    FigureCanvasSVG(figure)
    rows = figure.subplots(len(found), 3, squeeze=False)
    for row, (domain, results) in zip(rows, found.items(), strict=True):
        draw_bits(row[0], next(result for result in results if "bits_per_byte" in result))
        draw_costs(row[1], [result for result in results if "serving" in result])
        draw_training(row[2], results[0])
        row[0].set_ylabel(domain, fontweight="bold")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


def draw_bits(axes: Any, result: dict[str, Any]) -> None:
    """Bits per byte of the four models, with their intervals."""
    scores = result["bits_per_byte"]
    for place, (name, colour) in enumerate(MODELS.items()):
        score = scores[name]
        spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        axes.bar(place, score["value"], color=colour, yerr=spread, capsize=3)
        axes.text(place, score["high"] + 0.02, f"{score['value']:.3f}", ha="center", fontsize=8)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(MODELS)), [name.replace(", ", ",\n") for name in MODELS], fontsize=8)
    axes.set_title("bits per byte, held out (less is better)", fontsize=10)


def draw_costs(axes: Any, results: list[dict[str, Any]]) -> None:
    """What a character costs with the patched vocabulary, of the plain one's, on each device. Of seconds: the median of
    the runs' ratios, with the smallest and the largest."""
    keys = {"tokens in": "tokens_per_char_in", "tokens out": "tokens_per_char_out", "KV bytes": "kv_bytes_per_char"}
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        plain, patched = (result["serving"][name] for name in ("plain, tuned", "patched, tuned"))
        seconds = 1 / result["serving"]["patched over plain"]
        runs = [1 / each for each in result["serving"]["patched over plain, of runs"]]
        ratios = [*(patched[key] / plain[key] for key in keys.values()), seconds]
        colour, label = DEVICES[result["device"]]
        places = [place + (index - (len(results) - 1) / 2) * width for place in range(len(ratios))]
        axes.bar(places, ratios, width, color=colour, label=label)
        axes.errorbar(places[-1], seconds, [[seconds - min(runs)], [max(runs) - seconds]], color="black", capsize=3)
        for place, ratio, top in zip(places, ratios, [*ratios[:-1], max(runs)], strict=True):
            axes.text(place, top + 0.02, f"{ratio:.2f}", ha="center", fontsize=8 if len(results) == 1 else 7)
    axes.axhline(1, color=PLAIN, linewidth=1.5)
    axes.set_xticks(range(len(keys) + 1), [*keys, "seconds"], fontsize=8)
    axes.set_ylim(0, 1.3)
    axes.legend(fontsize=8, ncols=len(results), loc="upper left")
    axes.set_title("per character, plain = 1", fontsize=10)


def draw_training(axes: Any, result: dict[str, Any]) -> None:
    """Held-out bits per byte over passes of the text; dashed, the mean of the training text in each pass."""
    for name, colour in (("plain, tuned", PLAIN), ("patched, tuned", PATCHED)):
        run = result["training"][name]
        passes = run["settings"]["epochs"]
        points = [(row["step"] / run["steps"] * passes, row["bits_per_byte"]) for row in run["evaluations"]]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name.split(",")[0])
        means = run["training_bits_per_byte_of_passes"]
        ends = [min(passes, index + 1) for index in range(len(means))]
        axes.stairs(means, [0, *ends], color=colour, linestyle="--", baseline=None)
    axes.set_xlabel("passes; dashed: training text, mean of a pass", fontsize=8)
    axes.legend(fontsize=8)
    axes.set_title("bits per byte while tuning", fontsize=10)


if __name__ == "__main__":
    main()
