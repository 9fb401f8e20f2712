"""The project's lints: the tree is clean, and each lint finds an offence that is planted for it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from scripts.lints import Tree

LINTS = ("calls", "manifests", "words", "links", "habits")


def said_about(tmp_path: Path, lint: str, files: dict[str, str]) -> list[str]:
    """What a lint says about a tree of these files."""
    for path, text in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    offences: list[str] = importlib.import_module(f"scripts.lints.{lint}").offences(Tree(tmp_path))
    return offences


@pytest.mark.parametrize("lint", LINTS)
def test_the_tree_is_clean(root: Path, lint: str) -> None:
    """What `make check` says, as a test, so that a bare pytest run says it too."""
    assert importlib.import_module(f"scripts.lints.{lint}").offences(Tree(root)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "import marshal", "import shelve",
        "def f():\n    import dill", "import multiprocessing", "from multiprocessing import Process",
        "import torch.multiprocessing as mp", "from torch import multiprocessing",
        "from concurrent.futures import ProcessPoolExecutor", "eval('1')", "exec(text)", "__import__('os')",
        "compile(text, '', 'exec')", "import yaml\nyaml.load(text)", "from yaml import load\nload(text)",
        "from yaml import load as read\nread(text)", "import torch\ntorch.load(path)",
        "import torch as t\nload = t.load", "from torch import load", "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)", "socket.recv_pyobj()",
        "import numpy\nnumpy.load(path, allow_pickle=True)", "f(trust_remote_code=True)",
        "import jinja2\njinja2.Environment()", "from starlette.middleware.base import BaseHTTPMiddleware",
        "import time\nnow = time.time()", "from time import time\ntime()", "import time as t\nt.monotonic()",
        "from time import perf_counter as tick\ntick()", "import datetime\ndatetime.datetime.now()",
        "import os\nos.environ['A']", "import os\nos.environ.get('A')", "from os import environ\nenviron['A']",
        "from os import getenv\ngetenv('A')", "def f(:",
    ],
)  # fmt: skip
def test_code_from_data_is_found(tmp_path: Path, source: str) -> None:
    """Rule R1 of docs/security.md and the clock and environment rules, each spelling that came to mind."""
    assert said_about(tmp_path, "calls", {"engine/a.py": source}), source


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/a.py", "import yaml\nyaml.safe_load(text)"),
        ("engine/a.py", "import re\nre.compile('a')"),
        ("engine/a.py", "model.eval()\ncursor.load()"),
        ("engine/a.py", "import time\ntime.sleep(1)"),
        ("engine/a.py", "def f(clock):\n    time = clock.now_s()\n    return time"),
        ("engine/core/clock.py", "import time\ntime.time()\ntime.monotonic()"),
        ("engine/core/config.py", "import os\nos.environ.get('A')"),
        ("scripts/a.py", "import time, os\ntime.perf_counter()\nos.environ['A']"),
        ("engine/patching/upstream.py", "import pickle"),
    ],
)
def test_innocent_code_passes(tmp_path: Path, path: str, source: str) -> None:
    """The lint reads names in context: `model.eval()` is not `eval()`."""
    assert said_about(tmp_path, "calls", {path: source}) == []


def test_at_most_one_file_may_read_pickles() -> None:
    """The allow list is one file: the offline importer of upstream vocabularies."""
    from scripts.lints import calls

    assert len(calls.ALLOWED) <= 1


def test_a_test_without_a_list_is_told_the_line_to_add(tmp_path: Path) -> None:
    """The last line of the complaint can be pasted."""
    empty = {f"tests/manifests/{name}.txt": "# comment\n" for name in ("cpu", "gpu", "multi_gpu")}
    said = said_about(tmp_path, "manifests", {**empty, "tests/core/test_new.py": ""})
    assert len(said) == 1 and said[0].endswith("\ntests/core/test_new.py") and "cpu.txt" in said[0]


@pytest.mark.parametrize(
    ("cpu", "gpu", "said"),
    [
        ("tests/test_a.py\ntests/test_a.py\n", "", "listed 2 times"),
        ("tests/test_a.py\n", "tests/test_a.py\n", "listed 2 times (cpu, gpu)"),
        ("tests/test_a.py\ntests/test_gone.py\n", "", "there is no tests/test_gone.py"),
    ],
)
def test_a_wrong_list_is_found(tmp_path: Path, cpu: str, gpu: str, said: str) -> None:
    """Exactly one list, and only modules that exist."""
    lists = {"tests/manifests/cpu.txt": cpu, "tests/manifests/gpu.txt": gpu, "tests/manifests/multi_gpu.txt": ""}
    found = said_about(tmp_path, "manifests", {**lists, "tests/test_a.py": ""})
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "KEY = '" + "sk-" + "a1B2" * 12 + "'"),
        ("a.md", "-----BEGIN " + "RSA PRIVATE KEY-----"),
        ("a.yml", "token: " + "hf_" + "aB3d" * 9),
        ("docs/a.md", "AKIA" + "ABCDEFGHIJKLMNOP"),
        ("a.sh", "curl https://" + "user:" + "hunter22@example.org"),
        ("docs/a.md", "cd /" + "home/someone/checkout"),
        ("Makefile", "CACHE := /" + "root/.cache"),
        ("engine/a.py", "# TO" + "DO: later"),
        ("vattention_ext/a.cpp", "// FIX" + "ME"),
        ("engine/a.py", "raise NotImplemented" + "Error"),
    ],
)
def test_what_must_not_be_committed_is_found(tmp_path: Path, path: str, text: str) -> None:
    """Secrets, paths of one machine, unfinished places."""
    assert said_about(tmp_path, "words", {path: text})


def test_a_large_file_is_found(tmp_path: Path) -> None:
    """Models and text sets are fetched, not committed."""
    (tmp_path / "weights.bin").write_bytes(bytes((1 << 20) + 1))
    assert said_about(tmp_path, "words", {})


def test_dead_links_are_found_and_live_ones_pass(tmp_path: Path) -> None:
    """A file, a folder, a heading here, a heading there; addresses of other sites are not followed."""
    live = "# One `two`\n[a](docs/b.md) [b](docs) [c](#one-two) [d](docs/b.md#it-s) [e](https://example.org/x)\n"
    assert said_about(tmp_path, "links", {"README.md": live, "docs/b.md": "## It-s\n"}) == []
    dead = "[a](docs/none.md) [b](#none) [c](docs/b.md#none)\n```\n[d](in/code.md)\n```\n"
    assert len(said_about(tmp_path, "links", {"README.md": dead})) == 3


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/serve/a.py", '"""Doc."""\nlog.info("request %s", prompt)\n'),
        ("engine/serve/a.py", '"""Doc."""\nlogger.warning("bad", request.token_ids)\n'),
        ("engine/serve/a.py", '"""Doc."""\nself._log.debug(f"{x}")\n'),
        ("engine/serve/a.py", "import os\n"),
        ("engine/other/a.py", '"""Doc."""\n'),
        ("kernels/__init__.py", ""),
    ],
)
def test_bad_habits_are_found(tmp_path: Path, path: str, source: str) -> None:
    """Private values and eager formatting in logs, no docstring, no __init__.py, an __init__.py too many."""
    assert len(said_about(tmp_path, "habits", {"engine/serve/__init__.py": "", path: source})) == 1
