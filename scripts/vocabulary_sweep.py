"""Which settings tune a patched model best: `python -m scripts.vocabulary_sweep medical --work DIR --device cuda`.

Short trainings of both models on the beginning of the tuning text, several at a time, one table and one JSON file.
The texts and the patched model are those that scripts.vocabulary_experiment left in DIR. It measures bits per byte
of the held-out text to watch and tokens a second; it decides nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError
from engine.loading.resolve import resolve_model
from engine.patching.corpus import read_documents
from scripts.benching.environment import environment
from scripts.corpora import choose, write_texts
from scripts.vocabulary_experiment import DOMAINS, KINDS, Folder

SETTINGS = ("1:5e-4:1", "1:1e-3:1", "15:3e-4:1", "15:3e-4:4", "15:1e-3:1")
"""blocks at either end : learning rate : times that for the rows. The first is the paper's."""
SHOWN_LINES = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """One training."""

    kind: str
    blocks: int
    learning_rate: float
    row_rate: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.blocks}-{self.learning_rate:g}-{self.row_rate:g}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.vocabulary_sweep", description=__doc__)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="of scripts.vocabulary_experiment")
    parser.add_argument("--model", help="the base model (SmolLM2-135M-Instruct)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="BLOCKS:RATE:ROWS",
                        help="blocks that learn at either end, learning rate, times that for embedding and head")
    parser.add_argument("--bytes", type=int, default=12_000_000, help="text to tune on (%(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over it (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="blocks of 512 tokens an update (%(default)s)")
    parser.add_argument("--at-once", type=int, default=4, help="trainings that share the device (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON; default: DIR/DOMAIN-sweep.json")
    args = parser.parse_args()
    folder = Folder(args.work, args.domain)
    try:
        base = resolve_model(args.model)
        trials = list(trials_of(args.settings))
        texts = args.work / f"{args.domain}.sweep.jsonl"
        write_texts(texts, choose(read_documents([folder.texts("tuning")]), args.bytes))
        with ThreadPoolExecutor(args.at_once) as pool:
            found = list(pool.map(lambda trial: run(trial, folder, base, texts, args), trials))
        if not any(row["bits_per_byte"] for row in found):
            raise ConfigError("every training failed; see above")
    except ConfigError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    out = args.out or args.work / f"{args.domain}-sweep.json"
    facts = {"workload": f"adaptivocab-sweep-{args.domain}", "bytes": args.bytes, "epochs": args.epochs,
             "batch": args.batch, "trials": found,
             "environment": environment("vocabulary_sweep", sys.argv[1:])}  # fmt: skip
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(table(found))


def trials_of(settings: list[str]) -> Iterator[Trial]:
    """Both models with each. Raises ConfigError for another form."""
    for text in settings:
        try:
            blocks, rate, rows = text.split(":")
            for kind in KINDS:
                yield Trial(kind, int(blocks), float(rate), float(rows))
        except ValueError:
            raise ConfigError(f"--settings {text!r} is not of the form BLOCKS:RATE:ROWS, as 1:5e-4:1") from None


def run(trial: Trial, folder: Folder, base: Path, texts: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A trial's figures; None for bits per byte where it failed, with its last lines shown."""
    out, log = args.work / "sweep" / trial.name, args.work / "sweep" / f"{trial.name}.log"
    log.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    compiled = ("--compile",) if args.compile else ()
    words = ["--model", folder.applied if trial.kind == "patched" else base, "--corpus", texts, "--held-out",
             folder.texts("watch"), "--out", out, "--context", 512, "--batch", args.batch, "--micro-batch", args.batch,
             "--epochs", args.epochs, "--learning-rate", trial.learning_rate, "--row-rate", trial.row_rate,
             "--first-blocks", trial.blocks, "--last-blocks", trial.blocks, "--separator", "eos", "--dtype",
             "bfloat16", "--save-every", 0, "--device", args.device, *compiled]  # fmt: skip
    command = [sys.executable, "-m", "scripts.patch", "train", *map(str, words)]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // args.at_once))}
    with log.open("w", encoding="utf-8") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, **threads}).returncode  # fmt: skip
    said = log.read_text("utf-8", "replace")
    speed = re.search(r"learnt (\d+) tokens/s", said)
    found = {**asdict(trial), "bits_per_byte": None, "tokens_per_s": int(speed[1]) if speed else None}
    if code:
        print(f"{trial.name} failed:", *said.splitlines()[-SHOWN_LINES:], sep="\n  ", file=sys.stderr)
        return found
    report = json.loads((out / "training" / "run.json").read_text("utf-8"))
    shutil.rmtree(out)
    return {**found, "updates": report["steps"], "bits_per_byte": report["evaluations"][-1]["bits_per_byte"],
            "bits_per_byte_before": report["evaluations"][0]["bits_per_byte"]}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """One line a setting, both models side by side."""
    lines = ["blocks  rate     rows  patched  plain    ratio   tokens/s (patched, plain, sharing the device)"]
    for patched in (row for row in found if row["kind"] == "patched"):
        same = ("blocks", "learning_rate", "row_rate")
        plain = next(row for row in found if row["kind"] == "plain" and all(row[key] == patched[key] for key in same))
        bits = [row["bits_per_byte"] for row in (patched, plain)]
        shown = f"{bits[0]:.4f}   {bits[1]:.4f}   {bits[0] / bits[1]:.4f}" if all(bits) else f"{bits[0]}  {bits[1]}"
        lines.append(f"{patched['blocks']:<8}{patched['learning_rate']:<9g}{patched['row_rate']:<6g}{shown}  "
                     f"{patched['tokens_per_s']}, {plain['tokens_per_s']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
