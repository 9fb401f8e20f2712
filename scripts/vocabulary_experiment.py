"""What a domain vocabulary gains and loses, end to end: `python -m scripts.vocabulary_experiment medical --work DIR`.

Corpus, vocabulary, two fine-tuned models (patched and plain, same text and settings), then the figures of
docs/experiments/adaptivocab.md: tokens a character in and out, bits per byte on held-out text, characters a second
served, KV bytes a character, samples. What is in DIR already is not made again; an interrupted training goes on.
`--stage` runs one part. It knows the commands of scripts.patch, and the engine as its users do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from engine.core.errors import ConfigError
from engine.loading.resolve import resolve_model
from engine.patching.corpus import read_documents
from scripts.corpora import choose, write_texts
from scripts.vocabulary_figures import PARTS, figures

DOMAINS = ("medical", "legal")
STAGES = ("corpus", "build", "train", "measure")
WATCH_BYTES = {"cpu": 80_000, "cuda": 400_000}
"""Held-out text of which the bits per byte are followed while training."""
SCORED_BYTES = {"cpu": 200_000, "cuda": 100_000_000}
"""Held-out text that is measured in the end: on a GPU all there is."""
EVERY = {"cpu": (100, 50), "cuda": (400, 1000)}
"""Updates between two looks at the held-out text, and between two snapshots."""
KINDS = ("patched", "plain")

OPENINGS = {
    "medical": ("Patients with chronic heart failure were randomly assigned to",
                "We investigated the effect of the inhibitor on the growth of",
                "The aim of this study was to determine whether"),
    "legal": ("The licensor grants you a non-exclusive licence to",
              "In no event shall the authors be liable for",
              "You may distribute copies of the modified work provided that"),
}  # fmt: skip
"""Beginnings of our own, for the samples."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where everything of one domain lies."""

    work: Path
    domain: str

    def texts(self, part: str) -> Path:
        """train, held-out, tuning or watch."""
        return self.work / f"{self.domain}.{part}.jsonl"

    @property
    def vocabulary(self) -> Path:
        """The artefact."""
        return self.work / f"{self.domain}-vocab"

    def model(self, kind: str) -> Path:
        """patched or plain, fine-tuned."""
        return self.work / f"{self.domain}-{kind}"

    @property
    def applied(self) -> Path:
        """Patched, not fine-tuned."""
        return self.work / f"{self.domain}-applied"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.vocabulary_experiment", description=__doc__)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="texts, vocabularies and models")
    parser.add_argument("--model", help="the base model (SmolLM2-135M-Instruct)")
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--tuning-bytes", type=int, default=2_000_000, help="text to fine-tune on (%(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over it (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for training and serving (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="blocks of 512 tokens an update (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of both models (%(default)s)")
    parser.add_argument("--row-rate", type=float, default=1.0, help="times that for embedding and head (%(default)s)")
    parser.add_argument("--blocks", type=int, default=1, help="blocks that learn at either end (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--kind", choices=KINDS, help="train only this model, so that two commands can share a GPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, by comma (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON of the figures; default: DIR/DOMAIN-DEVICE.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = Folder(args.work, args.domain)
    try:
        base = resolve_model(args.model)
        for stage in STAGES if args.stage is None else (args.stage,):
            {"corpus": corpus, "build": build, "train": train, "measure": measure}[stage](folder, base, args)
    except ConfigError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None


def corpus(folder: Folder, _: Path, args: argparse.Namespace) -> None:
    """Both domains' texts (each is the other's foreign domain), Python's library as a third, and the parts to tune on
    and to watch."""
    for domain in DOMAINS:
        if not Folder(folder.work, domain).texts("train").is_file():
            call("corpora", domain, "--out", folder.work)
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    write_texts(folder.work / "python.jsonl", (path.read_text("utf-8", "replace") for path in library))
    watch_bytes = WATCH_BYTES[args.device]
    for part, source, limit_bytes in (("tuning", "train", args.tuning_bytes), ("watch", "held-out", watch_bytes)):
        write_texts(folder.texts(part), choose(read_documents([folder.texts(source)]), limit_bytes))


def build(folder: Folder, base: Path, _: argparse.Namespace) -> None:
    """The vocabulary, with its figures on held-out text of three domains."""
    if not folder.vocabulary.is_dir():
        others = [domain for domain in DOMAINS if domain != folder.domain]
        foreign = [f"{domain}={Folder(folder.work, domain).texts('held-out')}" for domain in others]
        call("patch", "build", "--base", base, "--corpus", folder.texts("train"), "--held-out",
             folder.texts("held-out"), *(f"--ood={each}" for each in (*foreign, f"python={folder.work}/python.jsonl")),
             "--num-tokens", "10000", "--max-n", "3", "--out", folder.vocabulary)  # fmt: skip


def train(folder: Folder, base: Path, args: argparse.Namespace) -> None:
    """Both models on the same text, `--epochs` passes of it, with the same settings."""
    if not folder.applied.is_dir():
        call("patch", "apply", "--model", base, "--patch", folder.vocabulary, "--out", folder.applied)
    evaluate_every, save_every = EVERY[args.device]
    compiled = ("--compile",) if args.compile else ()
    for kind, start in (("patched", folder.applied), ("plain", base)):
        if not folder.model(kind).is_dir() and args.kind in (None, kind):
            call("patch", "train", "--model", start, "--corpus", folder.texts("tuning"), "--held-out",
                 folder.texts("watch"), "--out", folder.model(kind), "--context", 512, "--batch", args.batch,
                 "--micro-batch", args.batch, "--epochs", args.epochs, "--learning-rate", args.learning_rate,
                 "--row-rate", args.row_rate, "--first-blocks", args.blocks, "--last-blocks", args.blocks,
                 "--separator", "eos", "--dtype", "bfloat16", "--evaluate-every", evaluate_every,
                 "--save-every", save_every, "--device", args.device, *compiled)  # fmt: skip


def measure(folder: Folder, base: Path, args: argparse.Namespace) -> None:
    """Every figure, each model in a process of its own, into one JSON file."""
    models = {"untouched": base, "plain, tuned": folder.model("plain"), "patched, not tuned": folder.applied,
              "patched, tuned": folder.model("patched")}  # fmt: skip
    vocabulary = json.loads((folder.vocabulary / "report.json").read_text("utf-8"))
    held_out = list(choose(read_documents([folder.texts("held-out")]), SCORED_BYTES[args.device]))
    parts = tuple(args.parts.split(","))
    found = {"vocabulary": vocabulary, **figures(models, held_out, OPENINGS[folder.domain], args.device, parts)}
    out = args.out or folder.work / f"{folder.domain}-{args.device}.json"
    out.write_text(json.dumps({"workload": f"adaptivocab-{folder.domain}", **found}, indent=1) + "\n", "utf-8")
    print(f"written to {out}")


def call(script: str, *words: object) -> None:
    """`python -m scripts.SCRIPT WORDS`, its output shown. Raises ConfigError when it fails."""
    command = [sys.executable, "-m", f"scripts.{script}", *map(str, words)]
    print("$", " ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"scripts.{script} failed; see above")


if __name__ == "__main__":
    main()
