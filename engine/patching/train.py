"""`python -m scripts.patch train`: light fine-tuning of a patched (or a plain) model folder into a new one.

Embedding, head, first and last block learn, as in the paper; AdamW, linear warm-up, cosine. Interrupted at any
point, the same command goes on from the last snapshot, on a CPU bit for bit. It knows files, settings and progress;
the arithmetic is train_step.py's, the order of the data train_data.py's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.clock import MonotonicClock
from engine.core.errors import ConfigError, LoadError
from engine.loading.resolve import resolve_model
from engine.loading.weights import open_weights
from engine.patching.artefact_files import read, write
from engine.patching.corpus import read_documents
from engine.patching.model_folder import (
    Raw,
    byte_bar,
    copy_of,
    copy_texts,
    publish,
    refuse_existing,
    scratch_beside,
    write_weights,
)
from engine.patching.place import FOLDER_NAME, find
from engine.patching.train_data import TokenBlocks, batched, bytes_of_ids, token_blocks
from engine.tokenization.jsonfile import MAX_CONFIG_BYTES, read_bytes, read_object, write_object

if TYPE_CHECKING:
    import torch

SNAPSHOTS_KEPT = 2
MAX_HISTORY_BYTES = 256 << 20
END_OF_TEXT = -1
"""As a separator: the first of the model's own ids that end a text."""
SETTLE_UPDATES = 16
"""Updates whose losses are left on a GPU before they are read, which waits for it."""
REPORT_FOLDER = "training"
_FREE = ("device", "save_every")
"""Settings that may differ when a run is resumed: they change no weight."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What fixes a run. context: tokens a block; batch: blocks an update; micro_batch: blocks in memory at a time;
    steps: updates, 0 = as `epochs` says; warmup: updates, -1 = a tenth of all, 500 at most; row_rate: embedding and
    head learn at so many times learning_rate; separator: id after each document, None = nothing, END_OF_TEXT = the
    model's own; dtype: float32, or bfloat16 (frozen weights and matrix products; what learns stays float32); compile:
    fuse the blocks by torch.compile; save_every: updates between snapshots, 0 = none. Defaults are the paper's."""

    context: int = 768
    batch: int = 32
    micro_batch: int = 1
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 5e-4
    warmup: int = -1
    row_rate: float = 1.0
    weight_decay: float = 0.1
    first_blocks: int = 1
    last_blocks: int = 1
    lora_rank: int = 0
    separator: int | None = None
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    device: str = "cpu"
    save_every: int = 100
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        lows = {"context": 2, "batch": 1, "micro_batch": 1, "steps": 0, "warmup": -1, "lora_rank": 0, "seed": 0,
                "save_every": 0, "evaluate_every": 0}  # fmt: skip
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {low}")
        if self.batch % self.micro_batch:
            raise ConfigError(f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch}")
        if not (self.learning_rate > 0 and self.row_rate > 0 and self.epochs > 0 and self.weight_decay >= 0):
            raise ConfigError("--learning-rate, --row-rate and --epochs must be above 0, --weight-decay at least 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype!r} is unknown; known: float32, bfloat16")


@dataclass
class _Run:
    """What has happened: updates done; (step, rate, nats, bits a byte) of each; (step, bits a byte, tokens) held out.
    """

    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)


def train(model: str | Path, documents: list[str], out: str | Path, settings: TrainSettings, *,
          state: str | Path | None = None, held_out: list[str] | None = None, progress: bool = False,
          stop: Callable[[int], bool] = lambda step: False) -> dict[str, Any]:
    """Fine-tune and write the folder `out`: the model, its tokenizer and patch, and training/ with loss.png,
    loss.csv and run.json.

    state: folder of snapshots (`out` + ".training"); an unfinished run of the same settings, text and model in it is
    resumed. held_out: texts whose bits per byte are measured before, after and every `evaluate_every` updates.
    stop: asked after each update; True ends the call there without a snapshot or `out`, as a kill would.
    Returns run.json's content. Raises ConfigError for settings, an existing `out` or another run's snapshots.
    """
    import torch

    from engine.patching import train_step
    from engine.tokenization import load_tokenizer

    folder, target = Path(model), Path(out)
    refuse_existing(target)
    tokenizer = load_tokenizer(folder)
    blocks = token_blocks(tokenizer, documents, settings.context, _separator(settings.separator, tokenizer, folder))
    settings = _resolve(settings, blocks)
    scored = _encoded(tokenizer, held_out or [])
    amp = settings.dtype == "bfloat16"
    network = train_step.load_model(folder, settings.device)
    _check_rows(network, tokenizer, folder)
    torch.manual_seed(settings.seed)
    trained = train_step.choose_trainable(network, settings.first_blocks, settings.last_blocks, settings.lora_rank,
                                          torch.bfloat16 if amp else torch.float32)
    rows = train_step.rows_of(network, trained)
    optimiser = train_step.make_optimiser(trained, settings.weight_decay, rows, settings.row_rate)
    loss_of = train_step.nats_of
    if settings.compile:
        train_step.compile_blocks(network)
        loss_of = torch.compile(loss_of, dynamic=False)
    place = _state_folder(target, state)
    identity = {"settings": {key: value for key, value in asdict(settings).items() if key not in _FREE},
                "model": _fingerprint(folder), "tokens_sha256": blocks.sha256,
                "held_out_sha256": hashlib.sha256(json.dumps(scored).encode()).hexdigest()}
    run = _resume(place, identity, trained, optimiser)
    byte_counts = bytes_of_ids(tokenizer)
    start = (*tokenizer.eos_ids, 0)[0]

    def evaluate() -> None:
        if scored:
            loss = train_step.evaluate(network, scored, settings.context, start, amp)
            run.evaluations.append([run.step, loss.bits_per_byte, loss.tokens])

    if run.step == 0:
        evaluate()
    clock, learnt_s, measured_from = MonotonicClock(), 0.0, 0
    fresh: list[tuple[float, torch.Tensor, Any]] = []  # rate, loss on its device and targets of updates not settled
    settle_after = 1 if settings.device == "cpu" else SETTLE_UPDATES
    with _StepBar(settings.steps, run.step, progress) as advance:
        while run.step < settings.steps:
            began_s = clock.now_s()
            rate = train_step.learning_rate(run.step, settings.steps, settings.warmup, settings.learning_rate)
            chosen = blocks.at_step(run.step, settings.batch, settings.seed)
            nats = train_step.train_step(network, optimiser, chosen, settings.micro_batch, rate,
                                         settings.seed * 1_000_003 + run.step, amp, loss_of)
            run.step += 1
            fresh.append((rate, nats, chosen[:, 1:]))
            last = run.step == settings.steps
            evaluating = last or (settings.evaluate_every and run.step % settings.evaluate_every == 0)
            saving = settings.save_every and (last or run.step % settings.save_every == 0)
            if evaluating or saving or len(fresh) >= settle_after:
                _settle(run, fresh, byte_counts)
                advance(len(fresh), run.history[-1][2])
                fresh.clear()
                if not measured_from:  # the first ones warm up, and may compile
                    measured_from, learnt_s, began_s = run.step, 0.0, clock.now_s()
            learnt_s += clock.now_s() - began_s
            if stop(run.step):
                return {}
            if evaluating:
                evaluate()
            if saving:
                _save(place, identity, run, trained, optimiser)
    if progress and run.step > measured_from > 0:
        speed = (run.step - measured_from) * settings.batch * settings.context / learnt_s
        print(f"learnt {speed:.0f} tokens/s", file=sys.stderr)
    report = {**identity, "steps": run.step, "documents": blocks.documents, "corpus_tokens": blocks.tokens,
              "corpus_utf8_bytes": blocks.utf8_bytes, "learning_parameters": sum(p.numel() for p in trained.values()),
              "evaluations": [dict(zip(("step", "bits_per_byte", "tokens"), row)) for row in run.evaluations]}
    _write_model(folder, target, train_step.learned_weights(network, trained), run, report, progress)
    return report


def _settle(run: _Run, fresh: list[tuple[float, torch.Tensor, Any]], byte_counts: Any) -> None:
    """Put the updates' losses into the history. Raises ConfigError for one that is no number."""
    for step, (rate, tensor, targets) in enumerate(fresh, run.step - len(fresh) + 1):
        nats = float(tensor)
        if not math.isfinite(nats):
            raise ConfigError(f"the loss became {nats} at update {step}; start again with a lower --learning-rate")
        bits = nats * targets.size / (math.log(2) * max(1, int(byte_counts[targets].sum())))
        run.history.append([step, rate, nats, bits])


def _separator(asked: int | None, tokenizer: Any, folder: Path) -> int | None:
    """The id to put after each document. Raises ConfigError when the model has no end of text."""
    if asked != END_OF_TEXT:
        return asked
    if not tokenizer.eos_ids:
        raise ConfigError(f"--separator eos: {folder} names no id that ends a text; give the id")
    return int(tokenizer.eos_ids[0])


def _resolve(settings: TrainSettings, blocks: TokenBlocks) -> TrainSettings:
    """Steps and warm-up as numbers. Raises ConfigError for a corpus smaller than one update."""
    per_epoch = blocks.steps_per_epoch(settings.batch)
    if not per_epoch:
        raise ConfigError(f"the corpus fills {len(blocks)} blocks of {settings.context} tokens, less than one update "
                          f"of --batch {settings.batch}; give more text, or a smaller batch or context")
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    return replace(settings, steps=steps, warmup=min(500, steps // 10) if settings.warmup < 0 else settings.warmup)


def _encoded(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], int]]:
    """(ids, UTF-8 bytes) of each text that has any."""
    found: list[tuple[list[int], int]] = []
    for some in batched(texts, 256):
        encoded = tokenizer.encode_batch(some, False)
        found += [(ids, len(text.encode())) for ids, text in zip(encoded, some, strict=True) if ids]
    return found


def _check_rows(network: Any, tokenizer: Any, folder: Path) -> None:
    rows = network.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise LoadError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {rows} rows; run "
                        "`python -m scripts.patch apply` with this patch first")


def _fingerprint(folder: Path) -> str:
    """SHA-256 of config, patch and the embedding's beginning: enough to tell models and methods of rows apart."""
    digest = hashlib.sha256(read_bytes(folder / "config.json", MAX_CONFIG_BYTES))
    place = find(folder)
    if place is not None:
        digest.update(read(place).sha256.encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f" {path.name} {path.stat().st_size} ".encode() + file.read(8 << 20))
    return digest.hexdigest()


# -------------------------------------------------------------------- snapshots


def _snapshots(place: Path) -> list[Path]:
    """Whole snapshots, oldest first."""
    return sorted(path for path in place.glob("step-*") if (path / "run.json").is_file())


def _save(place: Path, identity: dict[str, Any], run: _Run, trained: Any, optimiser: Any) -> None:
    """Publish a snapshot by rename, then drop the older ones."""
    from engine.patching.train_step import save_tensors

    target = place / f"step-{run.step:08d}"
    with scratch_beside(target) as scratch:
        save_tensors(scratch / "tensors.safetensors", trained, optimiser)
        write_object(scratch / "run.json", {**identity, "run": asdict(run)}, indent=None)
        publish(scratch, target)
    for old in _snapshots(place)[:-SNAPSHOTS_KEPT]:
        shutil.rmtree(old)


def _resume(place: Path, identity: dict[str, Any], trained: Any, optimiser: Any) -> _Run:
    """The newest snapshot's state, or a fresh run. Raises ConfigError when it belongs to another run."""
    from engine.patching.train_step import load_tensors

    found = _snapshots(place)
    if not found:
        return _Run()
    stored = read_object(found[-1] / "run.json", MAX_HISTORY_BYTES)
    for key, value in identity.items():
        if stored.get(key) == value:
            continue
        differing = next((f"--{name.replace('_', '-')} was {stored[key].get(name)}, is {now}"
                          for name, now in value.items() if stored[key].get(name) != now), key) \
            if isinstance(value, dict) and isinstance(stored.get(key), dict) else f"the {key} is another one"
        raise ConfigError(f"{place}: holds snapshots of another run ({differing}); give another --state, or remove it")
    try:
        run = _Run(**stored["run"])
    except (KeyError, TypeError):
        raise LoadError(f"{found[-1] / 'run.json'}: is damaged; remove {found[-1]}") from None
    load_tensors(found[-1] / "tensors.safetensors", trained, optimiser, run.step)
    return run


def _state_folder(out: str | Path, state: str | Path | None) -> Path:
    """Where snapshots go."""
    target = Path(out)
    return Path(state) if state is not None else target.with_name(target.name + ".training")


def _applied(folder: Path, patch: Path, out: Path, state: Path, *, progress: bool) -> Path:
    """The patched model to start from, kept among the snapshots so that a resumed run starts from the same."""
    from engine.patching.apply import apply_patch

    refuse_existing(out)
    artefact = read(patch, base_tokenizer_folder=folder)
    target = state / f"applied-{artefact.sha256[:16]}"
    if not target.is_dir():
        state.mkdir(parents=True, exist_ok=True)
        apply_patch(folder, artefact, target, progress=progress)
    return target


# -------------------------------------------------------------------- results


def _write_model(folder: Path, target: Path, learned: dict[str, torch.Tensor], run: _Run, report: dict[str, Any],
                 progress: bool) -> None:
    """The model folder again, with the learned tensors in their stored dtype, and the run's figures."""
    with open_weights(folder) as weights, scratch_beside(target) as scratch:
        plan = [copy_of(weights, name) for name in weights.names()]
        lost = sorted(learned.keys() - {tensor.name for tensor in plan})
        if lost:
            raise LoadError(f"{folder}: has no tensor {lost[0]!r}, which transformers trained; the checkpoint's names "
                            "are not those of its architecture; save it with save_pretrained first")
        made = {name: _bytes_of(tensor, weights.dtype(name)) for name, tensor in learned.items()}
        with byte_bar("writing", sum(tensor.nbytes for tensor in plan), progress) as advance:
            write_weights(scratch, weights, plan, made, advance)
        copy_texts(folder, scratch)
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, scratch / name)
        place = find(folder)
        if place is not None:
            write(read(place), scratch / FOLDER_NAME)
        _write_report(scratch / REPORT_FOLDER, run, report)
        publish(scratch, target)


def _bytes_of(tensor: torch.Tensor, dtype: str) -> Callable[[Raw], Raw]:
    """A function that gives the tensor's bytes in a stored dtype, whatever stood there."""

    def made(_: Raw) -> Raw:
        import torch

        from engine.loading.safetensors_header import TORCH_NAMES

        stored = tensor.to("cpu", getattr(torch, TORCH_NAMES[dtype])).contiguous()
        raw: Raw = stored.view(-1).view(torch.uint8).numpy()
        return raw

    return made


def _write_report(folder: Path, run: _Run, report: dict[str, Any]) -> None:
    """run.json, loss.csv and the picture."""
    folder.mkdir()
    write_object(folder / "run.json", report)
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("step", "learning_rate", "nats_per_token", "bits_per_byte"))
        rows.writerows(run.history)
    draw_loss(folder / "loss.png", run.history, run.evaluations)


def draw_loss(path: Path, history: list[list[float]], evaluations: list[list[float]]) -> None:
    """Training and held-out bits per byte over updates. Says so on stderr where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row[0] for row in history], [row[3] for row in history], linewidth=1, label="training, this update")
    if evaluations:
        axes.plot([row[0] for row in evaluations], [row[1] for row in evaluations], "o-", label="held out")
    axes.set(xlabel="update", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


class _StepBar:
    """A tqdm bar of updates on stderr, or nothing; called with how many were done, and the last one's loss."""

    def __init__(self, total: int, done: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted:
            from tqdm import tqdm

            self._bar = tqdm(desc="training", total=total, initial=done, unit="update", file=sys.stderr)

    def __enter__(self) -> Callable[[int, float], None]:
        def advance(updates: int, nats: float) -> None:
            if self._bar is not None:
                self._bar.set_postfix(nats=f"{nats:.3f}", refresh=False)
                self._bar.update(updates)

        return advance

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


# -------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scripts.patch train`."""
    default = TrainSettings()
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that `apply` wrote, or a plain model")
    parser.add_argument("--patch", metavar="DIR", help="a patch to apply to a plain model first, as `apply` does")
    parser.add_argument("--corpus", required=True, nargs="+", metavar="FILE", help=".txt or .jsonl, or .gz of them")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help="texts to measure bits per byte on")
    parser.add_argument("--documents", default="auto", help="how plain text is cut: auto, file, paragraph, line")
    parser.add_argument("--field", default="text", help="field of .jsonl lines (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--state", metavar="DIR", help="folder of snapshots (default: OUT.training)")
    for name, text in (
        ("context", "tokens a block"), ("batch", "blocks an update"), ("micro-batch", "blocks in memory at a time"),
        ("epochs", "passes over the corpus"), ("steps", "updates; 0: as --epochs says"),
        ("learning-rate", "peak of AdamW's learning rate"), ("warmup", "updates of warm-up; -1: a tenth, 500 at most"),
        ("row-rate", "embedding and head learn at so many times that rate"),
        ("weight-decay", "AdamW's weight decay"), ("first-blocks", "how many first blocks learn"),
        ("last-blocks", "how many last blocks learn"), ("seed", "of the order of the blocks"),
        ("lora-rank", "learn the blocks through adapters of this rank (needs peft); 0: whole"),
        ("save-every", "updates between snapshots; 0: none"),
        ("evaluate-every", "updates between --held-out measurements"),
    ):  # fmt: skip
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--separator", type=lambda text: END_OF_TEXT if text == "eos" else int(text), default=None,
                        metavar="ID", help="token id put after each document, or eos (default: none)")
    parser.add_argument("--compile", action="store_true", help="fuse the blocks by torch.compile")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype)
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; prints the report as one JSON line. Raises ConfigError or LoadError."""
    names = TrainSettings.__dataclass_fields__.keys()
    settings = TrainSettings(**{name: getattr(args, name) for name in names})
    folder = resolve_model(args.model, progress=not args.no_progress)
    documents, held_out = (list(read_documents(files, args.documents, args.field)) if files else []
                           for files in (args.corpus, args.held_out))
    clock = MonotonicClock()
    began_s = clock.now_s()
    state = _state_folder(args.out, args.state)
    if args.patch is not None:
        folder = _applied(folder, Path(args.patch), Path(args.out), state, progress=not args.no_progress)
    report = train(folder, documents, args.out, settings, state=state, held_out=held_out,
                   progress=not args.no_progress)
    print(f"trained in {clock.now_s() - began_s:.0f} s", file=sys.stderr)
    print(json.dumps(report))
    return 0
