"""The leakage table as a heat map: schemes down, attacks across, dark = recovered.

It draws what it is given; nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from scripts.scx_attacks.table import Row

ATTACKS = {  # column -> heading
    "A1 V": "A1 nearest\nvalue", "A1 K": "A1 nearest\nkey", "A2": "A2\nsorted", "A3": "A3 sorted\nmagnitudes",
    "A4": "A4\nlengths", "A5 D/4": "A5 known\nD/4", "A5 2D": "A5 known\n2D", "A5 half": "A5 half of\nsegment",
    "A6": "A6\ncollision", "A7": "A7 online\nscores", "A8 recall": "A8 equal\ntokens", "A9 raw": "A9 link\nraw",
    "A9 sorted": "A9 link\nsorted", "A9 norms": "A9 link\nlengths", "A9 gram": "A9 link\nGram",
    "A9 projection": "A9 link\nprojection",
}  # fmt: skip


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Write the picture; its format by its ending."""
    share: list[list[float]] = []
    for row in rows:
        found = {name: score.top1 for name, score in row.recovery.items()}
        found |= {name: value for name, (value, _) in row.rates.items()}
        share.append([found.get(name, float("nan")) for name in ATTACKS])
    figure, axes = plt.subplots(figsize=(13, 0.5 * len(rows) + 1.6))
    axes.imshow(share, cmap="Reds", vmin=0, vmax=1.15, aspect="auto")
    for y, line in enumerate(share):
        for x, value in enumerate(line):
            text = "" if value != value else f"{100 * value:.1f}" if value < 0.995 else "100"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "#222222")
    axes.set_xticks(range(len(ATTACKS)), list(ATTACKS.values()), fontsize=7.5)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [row.rules.label for row in rows], fontsize=8.5)
    axes.tick_params(length=0)
    axes.set_xlabel(f"per cent of tokens recovered (A1-A7) or rows matched (A8, A9): {title}", fontsize=8.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "scx"  # the same bytes for the same figures
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
