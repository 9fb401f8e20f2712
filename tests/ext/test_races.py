"""Races between the mapper and its callers, forced in a subprocess so that a hang cannot hold up the suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ext.race_child import SCENES

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 60


def run_scene(name: str, seconds: float) -> None:
    """One scene of race_child.py in a fresh interpreter."""
    command = [sys.executable, "-m", "tests.ext.race_child", name, str(seconds)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("name", SCENES)
def test_race(name: str) -> None:
    """The promise in the scene's docstring, for a short while."""
    run_scene(name, 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_race_for_long(name: str) -> None:
    """The same for ten seconds."""
    run_scene(name, 10)
