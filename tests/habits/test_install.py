"""The set-up behind `make serve` and `make test` says what a machine lacks, one line each, and then does nothing."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from scripts import install


def test_this_machine_lacks_nothing() -> None:
    """Whoever runs the tests has been through the same checks."""
    assert install.missing_tools(need_venv=False) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.setattr(sys, "version_info", _Version((3, 10, 1))), "Python 3.10 is too old"),
        (lambda patch: patch.setattr(sys, "platform", "darwin"), "needs Linux"),
        (lambda patch: patch.setattr(sysconfig, "get_path", lambda _: "/nowhere"), "headers are missing: apt install"),
        (lambda patch: patch.setenv("CXX", "no-such-compiler"), "apt install g++"),
        (lambda patch: patch.setattr(install.importlib.util, "find_spec", lambda _: None), "venv is incomplete"),
    ],
)
def test_what_is_missing_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch, change: object, said: str) -> None:
    """One line for each thing, naming it and how to get it."""
    assert callable(change)
    change(monkeypatch)
    lines = install.missing_tools(need_venv=True)
    assert len(lines) == 1 and said in lines[0]


class _Version(tuple[int, ...]):
    """A stand-in for sys.version_info."""

    major, minor = 3, 10


def test_a_missing_compiler_ends_with_one_line(root: Path, tmp_path: Path) -> None:
    """Exit status 1, no traceback, nothing made."""
    command = [sys.executable, str(root / "scripts/install.py"), "--state", str(tmp_path / ".venv"), "--for", "serve"]
    done = subprocess.run(command, env={"CXX": "no-such-compiler", "PATH": ""}, capture_output=True, text=True,
                          timeout=30, check=False)  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert done.stderr.count("\n") == 1 and "no C++ compiler (no-such-compiler)" in done.stderr


def test_without_a_virtual_environment_absent_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VENV=0 installs nothing and says which packages the interpreter lacks."""
    monkeypatch.setattr(install, "_installed", lambda name: name != "msgspec")
    problem = install.in_place(tmp_path / "path", "serve")
    assert problem is not None and problem.endswith("lacks: msgspec")
    assert not (tmp_path / "path").exists()
