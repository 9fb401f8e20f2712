"""One command for a GPU that is here for a short while: `python -m scripts.gpu_session --out DIR [--from PART]`.

Runs in the order of PARTS. Each part is a process of its own with a time budget; its output, a line for the table and
its JSON are in DIR before the next begins, so a cut-off loses at most one part, and `--from PART` goes on where it was
cut. What kernel parts measure is put into kernels/tuning/<device>.json, which later parts and the engine use;
DIR/settings.json is a copy to keep. A part whose packages are missing says which and is passed over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent.parent
TUNING = HERE / "kernels" / "tuning"
LEAST_S = 20.0  # no part starts with less left
TAIL_LINES = 12
SHOWN_LINES = 60  # of each part; DIR/<part>.log has all


@dataclass(frozen=True)
class Part:
    """One step of the session. needs: packages. kernels: sections of scripts.gpu_kernels, whose settings are kept."""

    name: str
    budget_s: float
    module: str = ""
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("torch",)
    kernels: bool = False


KERNELS = ("torch", "triton", "numpy")
ENGINE = (*KERNELS, "tqdm")
SERVER = (*ENGINE, "fastapi", "uvicorn", "zmq")
SHAPE = ("--shape", "llama3-8b", "--device", "cuda")
ONLINE = ("--runs", "1", "--workload", "online_mixed", "--chunk-size", "2048", "--tbt-target-ms", "20",
          "--tbt-bound-ms", "34.4", "--prompt-order", "deadline", "--ttft-target-ms", "1050")  # fmt: skip
PARTS = (
    Part("setup", 240, needs=()),
    Part("allocator", 90, "scripts.gpu_allocator"),
    Part("checks", 240, "scripts.gpu_kernels", ("--sections", "check"), KERNELS, True),
    Part("correctness", 300, "scripts.gpu_correctness", ("--budget-s", "270"), (*ENGINE, "safetensors")),
    Part("attention", 200, "scripts.gpu_kernels", ("--sections", "decode,prefill"), KERNELS, True),
    Part("products", 300, "scripts.gpu_kernels", ("--sections", "products,library,gemv,gemm"), KERNELS, True),
    Part("search", 330, "scripts.gpu_kernels", ("--sections", "search"), KERNELS, True),
    Part("load", 180, "scripts.gpu_kernels", ("--sections", "sustained"), KERNELS, True),
    Part("backends", 200, "scripts.gpu_kernels", ("--sections", "phases,sample,paged"), KERNELS, True),
    Part("bench-attention", 150, "scripts.bench", ("attention", "--device", "cuda", "--runs", "2"), KERNELS),
    Part("mapping", 90, "scripts.bench", ("mapping", *SHAPE, "--workload", "64x128+512,16x8192+4"), ENGINE),
    Part("tests", 420, "scripts.gpu_tests", ("--budget-s", "300"), (*ENGINE, "pytest", "hypothesis", "safetensors")),
    Part("layer", 100, "scripts.gpu_kernels", ("--sections", "layer,rows"), KERNELS, True),
    Part("profile", 120, "scripts.gpu_profile", (), ENGINE),
    Part("single", 60, "scripts.bench", ("latency", *SHAPE, "--runs", "3", "--workload", "single_stream"), ENGINE),
    Part("offline", 180, "scripts.bench", ("throughput", *SHAPE, "--runs", "2", "--chunk-size", "8192", "--workload",
                                           "decode_heavy,offline_chat,offline_long"), ENGINE),
    Part("chat-1024", 90, "scripts.bench", ("throughput", *SHAPE, "--runs", "2", "--chunk-size", "8192",
                                            "--max-num-seqs", "1024", "--workload", "offline_chat"), ENGINE),
    *(Part(f"online-{rate}", 75, "scripts.bench", ("serve", *SHAPE, *ONLINE, "--rate", rate), ENGINE)
      for rate in ("8", "12")),
    *(Part(f"http-{rate}", 90, "scripts.bench", ("serve", *SHAPE, *ONLINE, "--rate", rate, "--http"), SERVER)
      for rate in ("8", "12")),
    Part("startup", 120, "scripts.bench", ("startup", *SHAPE, "--runs", "2"), SERVER),
    *(Part(shape, 90, "scripts.bench", ("throughput", "--shape", shape, "--device", "cuda", "--runs", "1",
                                        "--chunk-size", "4096", "--workload", "1x512+256,decode_heavy,offline_chat"),
           ENGINE)
      for shape in ("llama2-7b", "mistral-7b", "qwen2-1.5b")),
    Part("scx", 150, "scripts.gpu_scx", ("--parts", "kernels,layers,engine", "--budget-s", "130"),
         (*ENGINE, "safetensors", "cryptography")),
    Part("scx-cost", 180, "scripts.gpu_scx", ("--parts", "admission,crossing,cost", "--budget-s", "150",
                                                "--secure", "cuda:0", "cpu"),
         (*ENGINE, "cryptography")),
    Part("sanitize", 110, "scripts.gpu_allocator", ("--sanitize",)),
    Part("soak", 550, "scripts.gpu_soak", ("--seconds", "480"), ENGINE),
)


# run by an interpreter of its own: the session itself holds no GPU memory
FACTS = """
import importlib.metadata, json, sys, torch
wanted = ("torch triton numpy safetensors msgspec transformers gguf fa3-fwd flashinfer-python flash-attn nanobind "
          "ninja pytest").split()
names = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"python": sys.version.split()[0], "cuda": torch.version.cuda, "gpu": gpu,
                  **{name: names.get(name) for name in wanted}}))
"""


class Session:
    """The parts' results so far, in DIR/session.json."""

    def __init__(self, out: Path, budget_s: float) -> None:
        self.out, self.ends_s = out, perf_counter() + budget_s
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "session.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.device: dict[str, str] = {}  # of set_up
        self.python_path = os.pathsep.join([str(HERE / "build" / "path"), str(HERE), os.environ.get("PYTHONPATH", "")])

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write a part's result down at once, with the tables of all parts."""
        self.results[name] = result
        self.file.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print(f"== {name}: {result['status']} after {result.get('seconds', 0):.0f} s", flush=True)

    def run(self, part: Part, scale: float) -> bool:
        """One part. Returns whether there was time for it."""
        left = self.ends_s - perf_counter()
        if left < LEAST_S:
            self.keep(part.name, {"status": "not started: the session's time is spent"})
            return False
        lacks = [package for package in part.needs if importlib.util.find_spec(package) is None]
        if lacks:
            self.keep(part.name, {"status": f"passed over: {', '.join(lacks)} not installed"})
            return True
        print(f"\n== {part.name}", flush=True)
        began = perf_counter()
        if part.name == "setup":
            status, tail = self.set_up()
        else:
            status, tail = self.child(self.command(part), min(part.budget_s * scale, left - 5), part.name)
        result = {"status": status, "seconds": round(perf_counter() - began, 1), "tail": tail}
        result |= self.gather(part) if part.kernels else self.device if part.name == "setup" else {}
        self.keep(part.name, result)
        return True

    def command(self, part: Part) -> list[str]:
        """The process of a part, told where its JSON goes and what was measured before."""
        command = [sys.executable, "-m", part.module, *part.options, "--json", str(self.out / f"{part.name}.json")]
        settings, copy = self.settings_file(), self.out / "settings.json"
        if settings is not None and copy.is_file() and not settings.is_file():  # a fresh checkout goes on here
            TUNING.mkdir(exist_ok=True)
            shutil.copyfile(copy, settings)
        if part.kernels and settings is not None and settings.is_file():
            command += ["--settings", str(settings)]
        return command

    def child(self, command: list[str], limit_s: float, name: str) -> tuple[str, list[str]]:
        """Run a process with its output here and in DIR/<name>.log. Returns its end in words and its last lines."""
        log = self.out / f"{name}.log"
        environment = {**os.environ, "PYTHONPATH": self.python_path, "PYTHONUNBUFFERED": "1"}
        with log.open("w", encoding="utf-8") as sink:
            process = subprocess.Popen(command, cwd=HERE, env=environment, stdout=sink, stderr=subprocess.STDOUT,
                                       start_new_session=True)  # fmt: skip
            try:
                code = process.wait(limit_s)
                status = "done" if code == 0 else f"failed with status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"cut off after {limit_s:.0f} s"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[-SHOWN_LINES:]:
            print(" ", line[:200])
        return status, [line[:400] for line in lines[-TAIL_LINES:]]

    def gather(self, part: Part) -> dict[str, Any]:
        """A kernel part's settings, into the place where kernels look and into DIR/settings.json."""
        file = self.out / f"{part.name}.json"
        if not file.is_file():
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
        target = self.settings_file()
        if target is not None and found.get("settings"):
            before = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
            facts = {key: found[key] for key in ("device", "torch", "copy_gbytes_s", "product_tflops_s")}
            merged = {**before, **facts, "settings": {**before.get("settings", {}), **found["settings"]}}
            TUNING.mkdir(exist_ok=True)
            for place in (target, self.out / "settings.json"):
                place.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        return {"failures": found.get("failures", [])[:20]}

    def settings_file(self) -> Path | None:
        """kernels/tuning/<device>.json of this GPU."""
        device = self.results.get("setup", {}).get("device")
        return TUNING / (device.lower().replace(" ", "_") + ".json") if device else None

    def set_up(self) -> tuple[str, list[str]]:
        """What is here, and the extensions built in the checkout where they are not."""
        status, lines = self.child([sys.executable, "-c", FACTS], 120, "setup")
        if status != "done":
            return status, lines
        here = json.loads(lines[-1])
        self.device = {"device": here["gpu"]} if here["gpu"] else {}
        tools = ("nvcc", "ninja", "g++", "compute-sanitizer")
        lines += [f"{tool}: {shutil.which(tool) or 'not found'}" for tool in tools]
        lacks = [name for name in ("vattention_ext._native", "tessera_kernels._cpu") if not self.imports(name)]
        if lacks:
            print(f"  building the extensions ({', '.join(lacks)} cannot be imported)", flush=True)
            link = HERE / "build" / "path" / "tessera_kernels"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(HERE / "kernels", target_is_directory=True)
            built, said = self.child([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 220, "setup")
            lines += [f"extensions: {built}", *said]
            still = [name for name in lacks if not self.imports(name)]
            status = f"failed: {', '.join(still)} cannot be imported" if still else status
        return (status if here["gpu"] else "failed: PyTorch sees no CUDA device"), lines

    def imports(self, name: str) -> bool:
        """Whether a fresh interpreter can import it."""
        environment = {**os.environ, "PYTHONPATH": self.python_path}
        return subprocess.run([sys.executable, "-c", f"import {name}"], cwd=HERE, env=environment, capture_output=True,
                              check=False).returncode == 0  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a part failed."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="scripts.gpu_session", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results go, and are read when going on")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="go on with this part")
    parser.add_argument("--only", default="", help=f"these parts, by comma; of: {', '.join(names)}")
    parser.add_argument("--budget-s", type=float, default=1e9, help="no part runs beyond so many seconds from now")
    parser.add_argument("--scale", type=float, default=1.0, help="of every part's own budget")
    asked = parser.parse_args(arguments)
    session = Session(asked.out, asked.budget_s)
    chosen = [name for name in asked.only.split(",") if name] or names[names.index(asked.first) :]
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    if "device" not in session.results.get("setup", {}) and "setup" not in chosen:
        chosen.insert(0, "setup")  # a machine that this DIR knows nothing of
    for part in PARTS:
        if part.name in chosen and not session.run(part, asked.scale):
            break
        if part.name == "setup" and session.results["setup"]["status"] != "done":
            break
    print("\npart          status")
    for name in names:
        if name in session.results:
            print(f"{name:14}{session.results[name]['status']}")
    return int(any(result["status"].startswith("failed") for result in session.results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
