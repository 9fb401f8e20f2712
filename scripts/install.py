"""What `make serve` and `make test` do before anything else: a virtual environment with this project in it.

Runs on any Python with the standard library alone. It knows nothing of models: the server obtains those itself.
With `--state .venv` it makes that environment; with any other folder (VENV=0) it installs nothing, checks that the
packages are there, and builds the extensions in the checkout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_TIMEOUT_S = 3.0
EXTRAS = {"serve": ("cpu",), "test": ("cpu", "test", "train"), "test-gpu": ("cpu", "test", "train")}
GPU_TESTS_NEED = ("pytest", "pytest-timeout", "hypothesis")  # beside what serving needs


def missing_tools(need_venv: bool) -> list[str]:
    """What this machine lacks, each with how to get it."""
    lacks = []
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < (3, 11):  # noqa: UP036  (this file must run on an older one to say so)
        lacks.append(f"Python {version} is too old, 3.11 or newer is needed: install one and pass PYTHON=python3.11")
    if not sys.platform.startswith("linux"):
        lacks.append(f"{sys.platform} is not supported: the KV cache needs Linux (memfd, mmap)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacks.append(f"Python's headers are missing: apt install python{version}-dev, or dnf install python3-devel")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        lacks.append(f"no C++ compiler ({compiler}): apt install g++, or dnf install gcc-c++")
    if need_venv and importlib.util.find_spec("ensurepip") is None:
        lacks.append(f"Python's venv is incomplete: apt install python{version}-venv")
    return lacks


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(f"install: {text}", file=sys.stderr, flush=True)


def run(*command: str, quiet: bool = False) -> bool:
    """Run a command in the checkout; whether there was one and it succeeded."""
    output = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run(command, cwd=HERE, stdout=output, stderr=output, check=False).returncode == 0
    except FileNotFoundError:
        return False


def cpu_index_answers() -> bool:
    """Whether PyTorch's index of CPU wheels can be reached within CPU_INDEX_TIMEOUT_S."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=CPU_INDEX_TIMEOUT_S) as answer:
            return answer.status == 200
    except OSError:
        return False


def install_torch(python: str, requirement: str) -> bool:
    """The CPU build of torch: from PyTorch's CPU index where it answers, otherwise what pip finds."""
    wanted = requirement.removeprefix("torch==")
    if run(python, "-c", f"import torch; assert torch.__version__.split('+')[0] == {wanted!r}", quiet=True):
        return True
    if cpu_index_answers():
        say(f"{requirement} from {CPU_INDEX}")
        if run(python, "-m", "pip", "install", requirement, "--index-url", CPU_INDEX):
            return True
    say(f"{requirement} from pip's own sources")
    return run(python, "-m", "pip", "install", requirement)


def in_venv(folder: Path, purpose: str) -> str | None:
    """Make or update the environment. Returns what went wrong, None when nothing did."""
    import tomllib

    versions = tomllib.loads((HERE / "requirements/versions.toml").read_text(encoding="utf-8"))
    python = str(folder / "bin" / "python")
    if not run(python, "-m", "pip", "--version", quiet=True):
        say(f"making {folder} with Python {sys.version.split()[0]}")
        if not run(sys.executable, "-m", "venv", "--clear", str(folder)):
            return f"could not make {folder}"
    build = [name + spec for name, spec in versions["build"].items()]
    say("torch (the largest download, about 200 MB)")
    if not install_torch(python, "torch" + versions["cpu"]["torch"]):
        return "torch could not be installed; is there a network or a local index?"
    say("building the extensions, installing the rest")
    extras = ",".join(EXTRAS[purpose])
    if not run(python, "-m", "pip", "install", "-q", *build):
        return "the build tools could not be installed"
    if not run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", f".[{extras}]"):
        return "the project could not be installed; the lines above say why"
    return None


def in_place(folder: Path, purpose: str) -> str | None:
    """VENV=0: check the packages of this interpreter, build in the checkout, make the mapped import names."""
    import tomllib

    versions = tomllib.loads((HERE / "requirements/versions.toml").read_text(encoding="utf-8"))
    wanted = [*versions["core"], *(versions["test"] if purpose == "test" else ())]
    wanted += GPU_TESTS_NEED if purpose == "test-gpu" else ()
    lacks = [name for name in wanted if not _installed(name)]
    if lacks:
        return f"VENV=0 installs nothing, and {sys.executable} lacks: {' '.join(lacks)}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in {"tessera_kernels": "kernels", "scx": "engine/scx/compat"}.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(HERE / source, target_is_directory=True)
    tools = HERE / "build" / "tools"
    search = [str(tools)] if not _installed("nanobind") else []
    if search and not (tools / "nanobind").is_dir():
        say("nanobind (needed to build only) into build/tools")
        if not run(sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), *versions["build"]):
            return "nanobind, which the build needs, is neither installed nor could be downloaded"
    given = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*search, *([given] if given else [])])}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=HERE, env=environment, check=False)
    return None if built.returncode == 0 else "the extensions could not be built; the lines above say why"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    """Exit status 0 when ready; 1 with one line per problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help=".venv, or the folder for VENV=0")
    parser.add_argument("--for", dest="purpose", choices=sorted(EXTRAS), required=True)
    options = parser.parse_args()
    folder = HERE / options.state
    venv = options.state.name == ".venv"
    problems = missing_tools(need_venv=venv and not (folder / "bin/python").exists())
    if not problems:
        problem = (in_venv if venv else in_place)(folder, options.purpose)
        problems = [problem] if problem else []
    for line in problems:
        say(line)
    if problems:
        return 1
    (folder / f".ready-{options.purpose}").touch()
    if options.purpose == "test":  # has everything that serving needs
        (folder / ".ready-serve").touch()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
