"""The project's own rules, one file each, as functions from a tree of files to lines of complaint.

Each file has `offences(tree) -> list[str]`; scripts/check.py runs them all, tests/habits plants an offence for each.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TEXT_ENDINGS = (".py", ".pyi", ".cpp", ".hpp", ".h", ".ipp", ".md", ".toml", ".yml", ".yaml", ".sh", ".txt", ".cfg",
                ".svg")  # fmt: skip
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@dataclass(frozen=True)
class Tree:
    """The files of a checkout: what git knows or would add; without git, all but build outputs."""

    root: Path

    @cached_property
    def files(self) -> list[str]:
        """Paths relative to the root, sorted."""
        command = ["git", "-C", str(self.root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, check=False)
        if listed.returncode == 0:
            names = [name for name in listed.stdout.decode().split("\0") if name]
        else:
            names = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*")
                     if not SKIPPED_FOLDERS.intersection(path.relative_to(self.root).parts)]  # fmt: skip
        return sorted(name for name in set(names) if (self.root / name).is_file())

    def named(self, *endings: str, under: tuple[str, ...] = ()) -> Iterator[str]:
        """Paths that end so and, where `under` is given, lie in one of those folders (or are one of those files)."""
        for name in self.files:
            inside = not under or any(name == top or name.startswith(top + "/") for top in under)
            if name.endswith(endings) and inside:
                yield name

    def text(self, name: str) -> str:
        """A file's text; bytes that are not UTF-8 become U+FFFD."""
        return (self.root / name).read_text(encoding="utf-8", errors="replace")
