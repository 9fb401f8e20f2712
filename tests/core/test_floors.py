"""Imports point down, never up, and the core loads without torch: engine/README.md, `Who may import whom`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lints import Tree, floors

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "fastapi", "zmq", "vattention_ext", "tessera_kernels")


def test_no_import_points_up(root: Path) -> None:
    """The promise of the layout, on the tree as it is."""
    assert floors.offences(Tree(root)) == []


def core_modules(root: Path) -> list[str]:
    """Every module of engine.core, in import form."""
    names = (path.relative_to(root).with_suffix("") for path in sorted((root / "engine/core").rglob("*.py")))
    return [".".join(name.parts).removesuffix(".__init__") for name in names]


def test_a_fresh_interpreter_loads_the_whole_core_without_torch(root: Path) -> None:
    """A scheduler test must never pay for torch; a lazy import inside core would be found by the walk above."""
    modules = core_modules(root)
    assert len(modules) > 5
    assert loaded_with(root, modules, HEAVY) == []


def test_the_server_process_and_its_text_workers_load_no_torch(root: Path) -> None:
    """A server answers /health while torch still loads elsewhere, and its memory is a tenth."""
    modules = ["app", "launch", "generation", "text_pool", "text_worker", "flags", "cli"]
    assert loaded_with(root, [f"engine.serve.{name}" for name in modules], ("torch", "transformers")) == []


def loaded_with(root: Path, modules: list[str], watched: tuple[str, ...]) -> list[str]:
    """Which of the watched packages a fresh interpreter has loaded after importing these modules."""
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {watched!r} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("engine/core/a.py", "import torch", "must not load torch"),
        ("engine/core/a.py", "def f():\n    import numpy", "neither of the standard library"),
        ("engine/core/a.py", "from engine.serve import app", "neither of the standard library"),
        ("engine/core/deep/a.py", "from ...serve import app", "neither of the standard library"),
        ("engine/tokenization/a.py", "from engine.runner.batch import Batch", "above it or beside it"),
        ("engine/tokenization/a.py", "import torch.nn", "must not load torch"),
        ("engine/loading/resolve.py", "from torch import nn", "must not load torch"),
        ("engine/models/a.py", "import engine.serve.app", "above it or beside it"),
        ("engine/parts/a.py", "from engine import serve", "above it or beside it"),
        ("engine/kv/a.py", "from engine.runner.runner import Runner", "above it or beside it"),
        ("kernels/a.py", "from engine.core import plan", "above it or beside it"),
        ("vattention_ext/a.py", "from engine.core import plan", "above it or beside it"),
        ("vattention_ext/a.py", "import torch", "must not load torch"),
        ("engine/parts/a.py", "import kernels.rope", "another project's package"),
        ("engine/runner/a.py", "from scripts.lints import Tree", "does not ship"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, path: str, source: str, said: str) -> None:
    """Each rule bites: without this, an empty table would look like a clean tree."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = floors.offences(Tree(tmp_path))
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{source.count(chr(10)) + 1}: ") and said in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/core/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("engine/core/a.py", "from engine.core.errors import ConfigError\nimport dataclasses\nfrom . import plan"),
        ("engine/loading/weights.py", "import torch"),
        ("engine/runner/a.py", "import torch, vattention_ext\nfrom engine.models import llama"),
        ("engine/serve/a.py", "import engine.exec.local, fastapi, engine.build"),
        ("kernels/a.py", "import torch\nfrom tessera_kernels import checks\nfrom . import checks"),
    ],
)
def test_an_import_that_points_down_is_fine(tmp_path: Path, path: str, source: str) -> None:
    """The rules do not forbid what the layout allows."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert floors.offences(Tree(tmp_path)) == []
