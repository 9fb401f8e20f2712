"""Build and package Tessera: two C++ extensions and the Python packages beside them.

Versions come from requirements/versions.toml, the project's version from engine/__init__.py.
It deliberately needs neither torch nor CUDA: the extensions link only libstdc++ and pthread.

    vattention_ext._native     from vattention_ext/csrc/*.cpp
    tessera_kernels._cpu       from kernels/cpu/*.cpp (the folder kernels/ is the package tessera_kernels)
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
VERSIONS = tomllib.loads((HERE / "requirements" / "versions.toml").read_text(encoding="utf-8"))
EXTENSIONS = {"vattention_ext._native": "vattention_ext/csrc", "tessera_kernels._cpu": "kernels/cpu"}
EXTRAS = ("cpu", "cuda", "hub", "train", "test", "bench")
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-fPIC", "-pthread", "-DNDEBUG", "-DNB_COMPACT_ASSERTIONS",
    "-Wall", "-Wextra",
]  # fmt: skip
# nanobind's own translation unit needs relaxed aliasing and is not ours to lint
NANOBIND_FLAGS = ["-fno-strict-aliasing", "-w"]


def requirements(section: str) -> list[str]:
    """`name + specifier` of every entry of a section of versions.toml, in file order."""
    return [name + spec for name, spec in VERSIONS[section].items()]


def extras() -> dict[str, list[str]]:
    """The extras; `dev` is everything a contributor on a CPU needs."""
    named = {name: requirements(name) for name in EXTRAS}
    named["dev"] = sorted({*named["cpu"], *named["train"], *named["test"], *named["bench"], *requirements("build")})
    return named


def version() -> str:
    """`__version__` of engine/__init__.py, read as text so that nothing is imported."""
    found = re.search(r'^__version__ = "([^"]+)"$', (HERE / "engine/__init__.py").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py: engine/__init__.py has no line __version__ = \"...\"; add one")
    return found.group(1)


def packages() -> list[str]:
    """Import packages in the wheel: engine.*, vattention_ext.*, tessera_kernels.* mapped onto kernels/, and scx, the
    name that users of SCX-vLLM import, mapped onto engine/scx/compat/."""
    ours = find_namespace_packages(str(HERE), include=["engine", "engine.*", "vattention_ext", "vattention_ext.*"])
    ours = [name for name in ours if any((HERE / name.replace(".", "/")).glob("*.py"))]
    kernels = ["tessera_kernels"]
    for folder in sorted((HERE / "kernels").rglob("*")):
        if folder.is_dir() and any(folder.glob("*.py")):
            kernels.append("tessera_kernels." + ".".join(folder.relative_to(HERE / "kernels").parts))
    return [*ours, *kernels, "scx"]


def extensions() -> list[Extension]:
    """The extensions whose sources exist. Headers are found by the compiler itself (-MMD)."""
    found = []
    for name, folder in EXTENSIONS.items():
        sources = sorted(path.relative_to(HERE).as_posix() for path in (HERE / folder).glob("*.cpp"))
        if sources:
            found.append(Extension(name, sources, include_dirs=[folder], language="c++"))
    return found


class IncrementalBuild(build_ext):
    """Compile each changed source once, two at a time, into build/objects; then link.

    A source is compiled again when its command, the file or any header it read last time has changed
    (the compiler writes that list with -MMD). nanobind is compiled once and linked into both extensions.
    """

    def build_extension(self, ext: Extension) -> None:
        nanobind_source = Path(nanobind.source_dir()) / "nb_combined.cpp"
        includes = [
            sysconfig.get_path("include"), nanobind.include_dir(),
            str(Path(nanobind.include_dir()).parent / "ext" / "robin_map" / "include"),
        ]  # fmt: skip
        jobs = [(Path(source), [*COMPILE_FLAGS, *(f"-I{folder}" for folder in ext.include_dirs)])
                for source in ext.sources]  # fmt: skip
        jobs.append((nanobind_source, [*COMPILE_FLAGS, *NANOBIND_FLAGS]))
        system = [flag for folder in includes for flag in ("-isystem", folder)]
        workers = self.parallel if isinstance(self.parallel, int) else min(2, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(lambda job: self._compile(job[0], [*job[1], *system]), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._link(objects, target)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: by rename, so that a running process keeps the library it has open."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            folder, _, name = ext.name.rpartition(".")
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = HERE / build_py.get_package_dir(folder) / Path(self.get_ext_filename(name)).name
            if not target.exists() or target.read_bytes() != built.read_bytes():
                partial = target.with_name(target.name + ".partial")
                shutil.copy2(built, partial)
                partial.replace(target)

    def _compiler(self) -> list[str]:
        """The C++ compiler: $CXX where set, else c++ (what every distribution's build tools provide)."""
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]

    def _compile(self, source: Path, flags: list[str]) -> Path:
        """Object file of `source`, compiled only if stale."""
        tag = f"{source.stem}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
        folder = HERE / "build" / "objects" / (sysconfig.get_config_var("SOABI") or "any")
        folder.mkdir(parents=True, exist_ok=True)
        output, depends, said = (folder / f"{tag}{end}" for end in (".o", ".d", ".cmd"))
        command = [*self._compiler(), *flags, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(output)]
        text = shlex.join(command)
        if not self.force and _fresh(output, depends, said, text):
            return output
        said.unlink(missing_ok=True)
        print("compiling", source, flush=True)
        subprocess.run(command, check=True, cwd=HERE)
        said.write_text(text, encoding="utf-8")
        return output

    def _link(self, objects: list[Path], target: Path) -> None:
        """Link under a temporary name and rename: a process that has the old library open keeps it whole."""
        newest = max(path.stat().st_mtime for path in objects)
        if not self.force and target.exists() and target.stat().st_mtime >= newest:
            return
        partial = target.with_name(target.name + ".partial")
        command = [*self._compiler(), "-shared", "-pthread", "-Wl,-s", *map(str, objects), "-o", str(partial)]
        print("linking", target, flush=True)
        subprocess.run(command, check=True, cwd=HERE)
        partial.replace(target)


def _fresh(output: Path, depends: Path, said: Path, command: str) -> bool:
    """Whether `output` was made by `command` from files that have not changed since."""
    if not (output.exists() and depends.exists() and said.exists() and said.read_text("utf-8") == command):
        return False
    made = output.stat().st_mtime
    read = shlex.split(depends.read_text("utf-8").replace("\\\n", " ").partition(":")[2])
    return all((HERE / name).exists() and (HERE / name).stat().st_mtime <= made for name in read)


readme = HERE / "README.md"
setup(
    name="tessera-serve",
    version=version(),
    description="LLM serving: a Sarathi scheduler over a vAttention KV cache",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=VERSIONS["python"],
    packages=packages(),
    package_dir={"tessera_kernels": "kernels", "scx": "engine/scx/compat"},
    package_data={"": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": IncrementalBuild},
    install_requires=requirements("core"),
    extras_require=extras(),
    entry_points={"console_scripts": ["tessera = engine.serve.cli:main"]},
    zip_safe=False,
)
