"""Versions are written once, in requirements/versions.toml; everything else repeats it exactly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import engine
from scripts import environment
from scripts.lints import Tree, floors


@pytest.fixture(scope="module")
def versions(root: Path) -> dict[str, Any]:
    """The one place."""
    return tomllib.loads((root / "requirements/versions.toml").read_text())


@pytest.fixture(scope="module")
def metadata(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What setup.py tells pip, in the words of PKG-INFO."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=60)
    return next(folder.glob("*.egg-info/PKG-INFO")).read_text()


def required(metadata: str, extra: str | None) -> dict[str, str]:
    """Name -> specifier of the core (extra None) or of an extra, as PKG-INFO says it."""
    found = {}
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE):
        name, specifier, marker = re.fullmatch(r"([\w.-]+)\s*([^;]*?)\s*(?:; extra == \"(\w+)\")?", line).groups()  # type: ignore[union-attr]
        if marker == extra:
            found[name.lower()] = specifier
    return found


@pytest.mark.parametrize("section", ["core", "cpu", "cuda", "hub", "train", "test", "bench"])
def test_setup_py_takes_its_requirements_from_there(metadata: str, versions: dict[str, Any], section: str) -> None:
    """install_requires and every extra."""
    assert required(metadata, None if section == "core" else section) == versions[section]


def test_name_version_python_and_command(root: Path, metadata: str, versions: dict[str, Any]) -> None:
    """The distribution's own facts; the version is the one in engine/__init__.py."""
    assert f"\nName: tessera-serve\nVersion: {engine.__version__}\n" in metadata
    assert f"\nRequires-Python: {versions['python']}\n" in metadata
    assert 'console_scripts": ["tessera = engine.serve.cli:main"]' in (root / "setup.py").read_text()


@pytest.mark.parametrize("name", sorted(environment.FILES))
def test_conda_files_are_current(root: Path, name: str) -> None:
    """environment.yml (CPU) and environment-cuda.yml; run `make environment` after a change."""
    assert (root / name).read_text() == environment.render(environment.FILES[name])


def test_conda_file_holds_every_requirement_of_setup_py(root: Path, metadata: str) -> None:
    """Compared with what pip is told, not with the generator: name and specifier of core, cpu and test."""
    text = (root / "environment.yml").read_text()
    pinned = {**required(metadata, None), **required(metadata, "cpu"), **required(metadata, "test")}
    assert len(pinned) > 15
    for name, specifier in pinned.items():
        assert f'- "{name}{specifier}"\n' in text


def test_the_build_tools_of_pyproject_are_the_same(root: Path, versions: dict[str, Any]) -> None:
    """pyproject.toml cannot read a file, so it repeats them."""
    stated = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    assert sorted(stated) == sorted(name + spec for name, spec in versions["build"].items())


# import name -> distribution name, where they differ
DISTRIBUTIONS = {"yaml": "pyyaml", "zmq": "pyzmq", "prometheus_client": "prometheus-client",
                 "huggingface_hub": "huggingface-hub", "fa3_fwd_interface": "fa3-fwd",
                 "flashinfer": "flashinfer-python", "flash_attn": "flash-attn"}  # fmt: skip
# attention backends that run where a user has them: both compile kernels, which no extra should start
WHERE_PRESENT = {"flashinfer-python", "flash-attn"}
OURS = {"engine", "tessera_kernels", "vattention_ext"}


def test_every_import_of_the_packages_is_a_requirement(root: Path, versions: dict[str, Any]) -> None:
    """What the wheel imports, pip installs with it (or by the extras `hub` and `train`); nothing comes by luck."""
    tree = Tree(root)
    imported = {
        target.partition(".")[0]
        for name in tree.named(".py", under=("engine", "kernels", "vattention_ext"))
        for _, target in floors.imports(ast.parse(tree.text(name)), "engine", is_package=True)
    }
    outside = {name for name in imported if name not in sys.stdlib_module_names} - OURS
    required = {DISTRIBUTIONS.get(name, name) for name in outside}
    assert "torch" in required
    extras = {name for extra in ("hub", "cuda", "train") for name in versions[extra]}
    assert required - {*versions["core"]} - extras - WHERE_PRESENT == set()
    assert set(versions["core"]) - required == set()  # and nothing is installed for nobody
