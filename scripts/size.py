"""Lines per folder, so that growth is seen: `python -m scripts.size [--files N]`. It forbids nothing."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from scripts.lints import Tree

ROOT = Path(__file__).resolve().parent.parent
CODE = (".py", ".pyi", ".cpp", ".hpp", ".h", ".ipp", ".sh")


def lines_by_file(tree: Tree) -> Counter[str]:
    """Path -> physical lines, code only."""
    return Counter({name: len(tree.text(name).splitlines()) for name in tree.named(*CODE)})


def folder_of(name: str) -> str:
    """The row a file counts under: two levels deep where there are two."""
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0] if len(parts) == 2 else "."


def main() -> int:
    """Print one row a folder, then the longest files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10, metavar="N", help="longest files to list (default 10)")
    options = parser.parse_args()
    files = lines_by_file(Tree(ROOT))
    folders: Counter[str] = Counter()
    for name, lines in files.items():
        folders[folder_of(name)] += lines
    for folder, lines in sorted(folders.items()):
        count = sum(folder_of(name) == folder for name in files)
        print(f"{lines:7,} lines  {count:4} files  {folder}")
    print(f"{sum(files.values()):7,} lines  {len(files):4} files  in all")
    for name, lines in files.most_common(options.files):
        print(f"{lines:7,} {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
