"""The documents keep up with the code: generated pages are current, commands in them exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core.config import EngineConfig, ServerConfig
from engine.core.knobs import settings
from scripts import flags

DOCUMENTS = ("README.md", "engine/README.md", "docs/*.md")
FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documents(root: Path) -> Iterator[Path]:
    """Every page a reader may follow."""
    for pattern in DOCUMENTS:
        yield from sorted(root.glob(pattern))


def commands(root: Path) -> list[tuple[str, str]]:
    """(page, one command line) from every shell block; continued lines joined, comments dropped."""
    found = []
    for page in documents(root):
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
                if text:
                    found.append((page.relative_to(root).as_posix(), text))
    return found


def known_flags() -> set[str]:
    """Every accepted spelling of every server flag, and --config."""
    names = {name for kind in (EngineConfig, ServerConfig) for setting in settings(kind) for name in setting.names}
    return names | {"config", "help"}


def test_the_page_of_flags_is_current(root: Path) -> None:
    """Run `python -m scripts.flags` after changing engine/core/config.py."""
    assert (root / "docs/flags.md").read_text() == flags.render()


def test_the_readme_has_the_two_commands(root: Path) -> None:
    """A newcomer needs no third."""
    lines = [line for page, line in commands(root) if page == "README.md"]
    assert "make serve" in lines and "make test" in lines
    assert any(line.startswith("curl ") for line in lines)


def test_every_make_target_exists(root: Path) -> None:
    """`make X` in a document is a rule of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    used = {word for _, line in commands(root) for word in re.findall(r"\bmake ([a-z-]+)", line)}
    assert used and used <= targets, used - targets


def test_every_module_exists(root: Path) -> None:
    """`python -m X` in a document can be found; nothing is run."""
    modules = {name for _, line in commands(root) for name in re.findall(r"python3? -m ([\w.]+)", line)}
    assert "engine.api_server" in modules
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


def test_every_file_named_in_a_command_exists(root: Path) -> None:
    """Scripts and tests that a document tells to run are there."""
    paths = {path for _, line in commands(root) for path in re.findall(r"\b(?:scripts|tests|docs)/[\w./-]+\.\w+", line)}
    assert [path for path in sorted(paths) if not (root / path).exists()] == []


def test_every_server_flag_exists(root: Path) -> None:
    """Flags behind api_server or `tessera serve`, in any document."""
    known = known_flags()
    unknown = [
        (page, flag)
        for page, line in commands(root)
        if "engine.api_server" in line or "tessera serve" in line or "ARGS=" in line
        for flag in re.findall(r"(?<!\w)--([\w-]+)", line)
        if flag.replace("-", "_") not in known
    ]
    assert unknown == []


def test_the_ci_runs_exactly_the_readme_s_test_command(root: Path) -> None:
    """.ci/run is `make test` and nothing that a developer would not have."""
    text = (root / ".ci/run").read_text()
    assert text.rstrip().endswith("make test") and "set -euo pipefail" in text
    assert (root / ".ci/run").stat().st_mode & 0o111


@pytest.mark.parametrize("path", ["README.md", "engine/README.md", "CHANGELOG.md", "LICENSE", "docs/benchmarks.md"])
def test_the_promised_pages_exist(root: Path, path: str) -> None:
    """Fixed names that others link to."""
    assert (root / path).stat().st_size > 200
