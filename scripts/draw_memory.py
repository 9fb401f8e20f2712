"""`python -m scripts.draw_memory`: draw docs/memory.svg, the picture of slots, pages and groups in docs/memory.md.

Sizes are SmolLM2's in bfloat16 with 2 MiB pages; nothing is measured.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "memory.svg"
IN_USE, LOOK_AHEAD, KEPT, SHARED, NOTHING, FREE = "#3b6ea5", "#9dc3e6", "#c9c9c9", "#d98a3d", "#ffffff", "#f3f3f3"
TOKEN_BYTES = 11_520  # 30 layers x 3 KV heads x 64 x 2 bytes
PAGE_BYTES = 2 << 20
PAGES_SHOWN = 9

# Pages of each slot, as they lie from its first token on: (colour, number of the physical page or None)
SLOTS = [
    ("slot 0: running", [(IN_USE, 0), (IN_USE, 3), (IN_USE, 4), (LOOK_AHEAD, 7)]),
    ("slot 1: running, shares its start with slot 3", [(SHARED, 2), (IN_USE, 5)]),
    ("slot 2: free, pages kept", [(KEPT, 1), (KEPT, 8)]),
    ("slot 3: running", [(SHARED, 2), (IN_USE, 6), (IN_USE, 9)]),
]


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
    """One rectangle with centred text; unmapped ranges are hatched."""
    hatch = "////" if colour == NOTHING else None
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="#888888" if hatch else "#333333",
                             hatch=hatch, linewidth=0.8))  # fmt: skip
    light = colour in (IN_USE, SHARED)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8,
              color="white" if light else "#222222")  # fmt: skip


def draw_slab(axes: Axes) -> None:
    """Virtual ranges of the K slab above, physical pages of the pool below."""
    axes.set_title("Virtual: the K slab (the V slab looks the same). A slot is max_model_len tokens of addresses.",
                   loc="left", fontsize=10)  # fmt: skip
    for row, (name, pages) in enumerate(SLOTS):
        y = 6.0 - row * 1.15
        axes.text(0, y + 0.72, name, fontsize=8.5, color="#222222")
        for column in range(PAGES_SHOWN):
            colour, page = pages[column] if column < len(pages) else (NOTHING, None)
            box(axes, column, y, 1, 0.6, colour, "" if page is None else f"page {page}")
        axes.text(PAGES_SHOWN + 0.08, y + 0.3, "...", va="center")
    axes.text(0, 1.62, "Physical: the pool (K pages). Each page is a piece of one memfd.",
              fontsize=10)  # fmt: skip
    used = {page: colour for _, pages in SLOTS for colour, page in pages}
    for page in range(12):
        box(axes, page * 0.75, 0.8, 0.75, 0.6, used.get(page, FREE), str(page))
    legend = [(IN_USE, "in use"), (LOOK_AHEAD, "look-ahead"), (SHARED, "shared, immutable"), (KEPT, "kept"),
              (FREE, "free"), (NOTHING, "not mapped: a touch faults")]  # fmt: skip
    for index, (colour, text) in enumerate(legend):
        x = (0, 1.2, 2.55, 4.3, 5.2, 6.1)[index]
        box(axes, x, 0.05, 0.28, 0.35, colour)
        axes.text(x + 0.35, 0.22, text, va="center", fontsize=8)
    axes.set_xlim(-0.1, PAGES_SHOWN + 0.5)
    axes.set_ylim(-0.1, 7.0)


def draw_page(axes: Axes) -> None:
    """Where tokens end and pages end: not at the same byte."""
    axes.set_title("One page of the mega layout: all layers of 182 tokens and the first 512 bytes of token 182",
                   loc="left", fontsize=10)  # fmt: skip
    whole = PAGE_BYTES // TOKEN_BYTES
    shown = [("token 0", 1.3), ("token 1", 1.3), ("...", 0.8), (f"token {whole - 1}", 1.3), (f"token {whole}", 1.3),
             (f"token {whole + 1}", 1.3)]  # fmt: skip
    x = 0.0
    edge = 0.0
    for name, width in shown:
        box(axes, x, 0.5, width, 0.6, "#dfe9f3", name)
        if name == f"token {whole}":
            edge = x + 0.18
        x += width
    axes.plot([edge, edge], [0.42, 1.4], color="#c0392b", linewidth=1.6)
    axes.text(edge, 1.46, f"page boundary, byte {PAGE_BYTES:,}", ha="center", fontsize=8, color="#c0392b")
    axes.text(0, 0.22, f"a token: {TOKEN_BYTES:,} bytes of K = layers x KV heads x head size x 2 bytes; layer 0 first",
              fontsize=8)  # fmt: skip
    axes.set_xlim(-0.1, PAGES_SHOWN + 0.5)
    axes.set_ylim(0.1, 1.75)


def main() -> int:
    """Draw and write the file; the same bytes every time for one matplotlib."""
    plt.rcParams.update({"svg.hashsalt": "tessera", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (slab, page) = plt.subplots(2, 1, figsize=(9.6, 6.6), height_ratios=[4.2, 1.0])
    draw_slab(slab)
    draw_page(page)
    for axes in (slab, page):
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
