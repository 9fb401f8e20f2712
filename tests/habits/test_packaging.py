"""The wheel holds what it must and nothing else, and works without the checkout; import names do not clash."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import engine
from scripts.lints import Tree


def python(code: str, folder: Path, *search: Path) -> str:
    """Standard output of a fresh interpreter in `folder` with `search` before everything installed."""
    prepared = f"import sys; sys.path[:0] = {[str(path) for path in search]!r}\n{code}"
    done = subprocess.run([sys.executable, "-I", "-c", prepared], cwd=folder, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built outside it (objects already compiled are used again)."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "build", "--build-base",
               str(folder / "build"), "bdist_wheel", "--dist-dir", str(folder)]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents as an installer would lay them out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def starts(names: Sequence[str], *tops: str) -> list[str]:
    """The names under one of these folders."""
    return [name for name in names if name.startswith(tuple(f"{top}/" for top in tops))]


def test_the_wheel_ships_the_packages_and_nothing_else(wheel: Path, root: Path) -> None:
    """Five top-level names; every Python file of the packages; extensions, stubs, markers, settings; no C++ sources."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    facts = f"tessera_serve-{engine.__version__}.dist-info"
    assert tops == {"engine", "scx", "tessera_kernels", "vattention_ext", facts}
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".h", ".ipp", ".o"))]
    for folder, package in (("engine", "engine"), ("kernels", "tessera_kernels"), ("vattention_ext", "vattention_ext")):
        wanted = {f"{package}/{path.relative_to(root / folder).as_posix()}"
                  for end in ("*.py", "*.pyi", "py.typed", "tuning/*.json")
                  for path in (root / folder).rglob(end)}  # fmt: skip
        assert wanted == {name for name in starts(names, package) if not name.endswith(".so")}
        assert f"{package}/py.typed" in names
    assert [name for name in names if name.startswith("vattention_ext/_native") and name.endswith(".so")]
    assert [name for name in names if name.startswith("tessera_kernels/_cpu") and name.endswith(".so")]


def test_the_wheel_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The installed packages import from where they were unpacked, extensions included."""
    code = (
        "import engine.core.scheduler, vattention_ext, tessera_kernels.rmsnorm\n"
        "from vattention_ext import _native\nfrom tessera_kernels import _cpu\n"
        "for m in (engine, vattention_ext, tessera_kernels.rmsnorm, _native, _cpu): print(m.__file__)"
    )
    assert all(line.startswith(f"{installed}/") for line in python(code, tmp_path, installed).splitlines())


def test_the_console_command_is_declared(wheel: Path) -> None:
    """`tessera` starts the same code as `python -m engine.api_server`."""
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "tessera = engine.serve.cli:main" in archive.read(entry).decode()


def test_the_source_archive_can_build_everything(root: Path, tmp_path: Path) -> None:
    """Every source, header, version and test of the checkout is in the sdist; no build output is."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir",
               str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set(Tree(root).files) - {".gitignore", ".ci/run"}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_another_package_called_kernels_is_not_hidden(root: Path, tmp_path: Path) -> None:
    """Hugging Face's `kernels` is a regular package: it beats our folder even in the checkout, and ours still works."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("OWNER = 'theirs'\n")
    code = "import kernels, tessera_kernels.rmsnorm; print(kernels.OWNER, tessera_kernels.rmsnorm.__name__)"
    assert python(code, root, root, tmp_path) == "theirs tessera_kernels.rmsnorm"
    assert python(code, tmp_path, tmp_path) == "theirs tessera_kernels.rmsnorm"


def test_exported_names(root: Path) -> None:
    """`from engine import LLM, SamplingParams`, lazily: importing engine loads no torch."""
    assert set(engine.__all__) == {"LLM", "SamplingParams", "__version__"}
    assert set(engine.__all__) <= set(dir(engine)) | set(engine._HOMES)
    assert python("import engine; print('torch' in sys.modules)", root) == "False"
    assert python("from engine import LLM, SamplingParams as S; print(LLM.__name__, S().max_tokens)", root) == "LLM 16"
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        engine.Llm  # noqa: B018
