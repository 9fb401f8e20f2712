"""`make environment`: write environment.yml (CPU) and environment-cuda.yml from requirements/versions.toml.

conda brings Python, its headers, a compiler and make; pip brings the rest, so that both ways give the same versions.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SYSTEM = ("gxx_linux-64", "make", "pip")
FILES = {"environment.yml": "cpu", "environment-cuda.yml": "cuda"}


def render(variant: str) -> str:
    """The text of one file. variant: "cpu" | "cuda"."""
    versions = tomllib.loads((ROOT / "requirements" / "versions.toml").read_text(encoding="utf-8"))
    other = next(name for name, its in FILES.items() if its != variant)
    sections = ("core", variant, "train", "test", "bench", "build")
    wanted = {name: spec for section in sections for name, spec in versions[section].items()}
    what = {"cpu": "CPU", "cuda": "CUDA"}
    lines = [
        "# Written by `make environment` from requirements/versions.toml; change that file instead.",
        f"# This is the {what[variant]} environment; {other} is the {what[FILES[other]]} one.",
        f"#   conda env create -f {next(name for name, its in FILES.items() if its == variant)}",
        "#   conda activate tessera && pip install --no-build-isolation --no-deps -e .",
        "name: tessera",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        f"  - python{versions['python']}",
        *(f"  - {name}" for name in SYSTEM),
        "  - pip:",
    ]
    if variant == "cpu":
        lines.append(f"      - --extra-index-url {CPU_INDEX}")
    lines += [f'      - "{name}{spec}"' for name, spec in sorted(wanted.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files."""
    for name, variant in FILES.items():
        (ROOT / name).write_text(render(variant), encoding="utf-8")
        print(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
