"""`python -m scripts.patch apply`: a model folder and a patch become the model folder of the patched vocabulary.

Only embedding, head and ids change; every other tensor is copied byte by byte, one at a time. It knows the layout
of Hugging Face folders; the rows' formulas are embeddings.py's, the ids' keys config_ids.py's, and what an artefact
promises artefact.py's. No torch: bytes in, bytes out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from engine.core.errors import ConfigError, LoadError
from engine.loading.resolve import resolve_model
from engine.loading.safetensors_header import ELEMENT_BYTES, read_header, write_file
from engine.loading.weights import INDEX_NAME, WeightSource, open_weights
from engine.patching.artefact import FOLDER_NAME, Artefact, find, read, write
from engine.patching.config_ids import IdMap, remap_ids
from engine.patching.embeddings import METHODS, NUMPY_DTYPES, Method, Side, patched_matrix
from engine.tokenization.jsonfile import read_object, write_object

log = logging.getLogger(__name__)

INPUT_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_ENDINGS = ("lm_head.weight", "embed_out.weight")
HEAD_NAME = "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model")
OTHER_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")

Progress = Callable[[int], None]
Tying = Literal["auto", "untie", "input", "output"]


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What apply_patch did. rows: of embedding and head, before and after; ngram_rows: computed from several old
    rows; tied_before, tied_after: head and embedding are one matrix; extra_bytes: what untying added."""

    out: str
    method: str
    dtype: str
    rows_before: int
    rows_after: int
    ngram_rows: int
    tied_before: bool
    tied_after: bool
    extra_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the output: its file and name, stored dtype and shape, and whose rows it is made of.

    source: the tensor of the checkpoint it comes from; side: None = copied as it is.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    side: Side | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


def apply_patch(model: str | Path, artefact: Artefact, out: str | Path, *, method: Method = "exp",
                tying: Tying = "auto", progress: bool = False) -> ApplyReport:
    """Write the patched model's folder: weights, configs with their ids mapped, tokenizer files, patch/.

    model: a folder with config.json and safetensors; artefact: already checked against its tokenizer. method: exp
    (input and output rows differ, so a tied model is untied) or mean (a tied model stays tied). tying: "untie"
    unties in any case; "input" or "output" keeps a tied model tied with the rows of that side in both places.
    Everything is written beside `out` and renamed: there is a whole folder or none. Memory: one tensor.
    Raises ConfigError when `out` exists or tying does not fit the model, LoadError for a model that does not fit
    the artefact (rows, ids of removed tokens in a config).
    """
    source_folder, target = Path(model), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {target}: exists already; give a new folder, or remove it first")
    config = read_object(source_folder / "config.json")
    if find(source_folder) is not None or "tessera_patch" in config:
        raise LoadError(f"{source_folder}: is patched already: its rows are no longer the base tokenizer's; apply to "
                        "the model that it was made from")
    with open_weights(source_folder) as weights, _scratch_beside(target) as scratch:
        plan, tied_before, tied_after = _plan(weights, config, artefact, method, tying)
        _write_configs(source_folder, scratch, config, artefact, tied_after, method)
        total_bytes = sum(tensor.nbytes for tensor in plan)
        with _bar(f"applying {method} rows", total_bytes, progress) as advance:
            _write_weights(scratch, weights, plan, artefact, method, advance)
        _copy_texts(source_folder, scratch)
        write(artefact, scratch / FOLDER_NAME)
        _check_result(scratch, len(artefact.old_ids))
        embedding = _find(weights, INPUT_ENDINGS, "embedding")
        _publish(scratch, target)
    rows = len(artefact.old_ids)
    return ApplyReport(
        out=str(target), method=method, dtype=weights.dtype(embedding),
        rows_before=weights.shape(embedding)[0], rows_after=rows,
        ngram_rows=sum(len(old) > 1 for old in artefact.old_ids), tied_before=tied_before, tied_after=tied_after,
        extra_bytes=sum(t.nbytes for t in plan if t.side == "output") if tied_before and not tied_after else 0,
        total_bytes=total_bytes,
    )


# -------------------------------------------------------------------- which tensors


def _plan(weights: WeightSource, config: dict[str, Any], artefact: Artefact, method: Method,
          tying: Tying) -> tuple[list[_Tensor], bool, bool]:
    """(output tensors, tied before, tied after). A tied model's copy of the head in the file counts as absent."""
    embedding, head = _find(weights, INPUT_ENDINGS, "embedding"), _find_head(weights)
    flag = config.get("tie_word_embeddings", head is None)
    if not isinstance(flag, bool):
        raise LoadError(f"{weights.folder / 'config.json'}: tie_word_embeddings={str(flag)[:40]!r} is not true or "
                        "false")
    if not flag and head is None:
        raise LoadError(f"{weights.folder}: tie_word_embeddings is false, but the checkpoint has no head tensor "
                        f"({' or '.join(OUTPUT_ENDINGS)}); weights and config.json do not belong together")
    if not flag and tying in ("input", "output"):
        raise ConfigError(f"--keep-tied {tying}: this model's head and embedding are two matrices; leave it out")
    tied_after = flag and (tying in ("input", "output") or (method == "mean" and tying == "auto"))
    _check_rows(weights, embedding, config, artefact)
    rows = len(artefact.old_ids)
    plan = []
    for name in weights.names():
        side: Side | None = None
        if name == embedding:
            side = "output" if tying == "output" and tied_after else "input"
        elif head is not None and name in (head, head.removesuffix(".weight") + ".bias"):
            if flag and name == head:
                continue  # loading would overwrite it by the embedding; what it holds is nobody's
            side = "output"
        shape = weights.shape(name) if side is None else (rows, *weights.shape(name)[1:])
        plan.append(_Tensor(weights.file_of(name).name, name, weights.dtype(name), shape, name, side))
    if flag and not tied_after:
        old = next(tensor for tensor in plan if tensor.name == embedding)
        plan.append(_Tensor(old.file, head or HEAD_NAME, old.dtype, old.shape, embedding, "output"))
    return plan, flag, tied_after


def _check_rows(weights: WeightSource, embedding: str, config: dict[str, Any], artefact: Artefact) -> None:
    """Embedding and head must have a row for every base id; rows beyond the vocabulary are padding."""
    for name in filter(None, (embedding, _find_head(weights))):
        shape, dtype = weights.shape(name), weights.dtype(name)
        if len(shape) != 2 or shape[0] < artefact.base_vocab_size or shape[0] != config.get("vocab_size"):
            raise LoadError(f"{weights.file_of(name)}: tensor {name!r} has shape {shape}; the patch is for "
                            f"{artefact.base_vocab_size} base ids and config.json says vocab_size="
                            f"{str(config.get('vocab_size'))[:40]}: it must have that many rows, and no fewer than "
                            "the base ids")
        if dtype not in NUMPY_DTYPES:
            raise LoadError(f"{weights.file_of(name)}: tensor {name!r} is stored as {dtype}; rows of n-grams can be "
                            f"computed in {', '.join(NUMPY_DTYPES)}; convert the checkpoint")


def _find(weights: WeightSource, endings: tuple[str, ...], what: str) -> str:
    """The one tensor whose name ends like an embedding's (or a head's)."""
    found = [name for name in weights.names() if any(("." + name).endswith("." + ending) for ending in endings)]
    if len(found) != 1:
        raise LoadError(f"{weights.folder}: has {len(found)} tensors that look like the {what} "
                        f"({', '.join(found[:4]) or ', '.join(endings)}); it must be exactly one")
    return found[0]


def _find_head(weights: WeightSource) -> str | None:
    """The head's tensor, None when the checkpoint stores none."""
    if not any(("." + name).endswith("." + ending) for name in weights.names() for ending in OUTPUT_ENDINGS):
        return None
    return _find(weights, OUTPUT_ENDINGS, "head")


# -------------------------------------------------------------------- writing


def _write_weights(folder: Path, weights: WeightSource, plan: list[_Tensor], artefact: Artefact, method: Method,
                   advance: Progress) -> None:
    """The source's files again, one after the other, and the index where there are several (or was one)."""
    mapped: dict[Path, tuple[npt.NDArray[np.uint8], dict[str, tuple[int, int]]]] = {}

    def chunks(tensors: list[_Tensor]) -> Iterator[bytes]:
        for tensor in tensors:
            path = weights.file_of(tensor.source)
            if path not in mapped:
                mapped.clear()  # one source file is mapped at a time
                mapped[path] = _map_file(path)
            data, places = mapped[path]
            begin, end = places[tensor.source]
            raw = data[begin:end]
            if tensor.side is not None:
                raw = _new_rows(raw, weights, tensor, artefact, method)
            yield cast(bytes, memoryview(raw))
            advance(tensor.nbytes)

    files: dict[str, list[_Tensor]] = {}
    for tensor in plan:
        files.setdefault(tensor.file, []).append(tensor)
    for file, tensors in files.items():
        write_file(folder / file, [(t.name, t.dtype, t.shape) for t in tensors], chunks(tensors))
    if set(files) != {"model.safetensors"}:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan)},
                 "weight_map": {tensor.name: tensor.file for tensor in plan}}
        write_object(folder / INDEX_NAME, index)


def _map_file(path: Path) -> tuple[npt.NDArray[np.uint8], dict[str, tuple[int, int]]]:
    """(the file's bytes, mapped; tensor name -> [begin, end) in them)."""
    infos = read_header(path)
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    return data, {name: (start + info.begin, start + info.end) for name, info in infos.items()}


def _new_rows(raw: npt.NDArray[np.uint8], weights: WeightSource, tensor: _Tensor, artefact: Artefact,
              method: Method) -> npt.NDArray[np.uint8]:
    """The bytes of an embedding, head or bias of the patched vocabulary."""
    assert tensor.side is not None
    numbers = np.frombuffer(raw, NUMPY_DTYPES[tensor.dtype]).reshape(weights.shape(tensor.source))
    made = patched_matrix(numbers, tensor.dtype, artefact.old_ids, method, tensor.side)
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8)


def _write_configs(source: Path, folder: Path, config: dict[str, Any], artefact: Artefact, tied: bool,
                   method: Method) -> None:
    """config.json and generation_config.json, their ids mapped."""
    ids = IdMap(artefact.new_id_of, artefact.removed, artefact.base_vocab_size)
    mapped = remap_ids(config, ids, str(source / "config.json"))
    mapped["vocab_size"] = len(artefact.old_ids)
    mapped["tie_word_embeddings"] = tied
    mapped["tessera_patch"] = {"folder": FOLDER_NAME, "base_sha256": artefact.base_sha256, "rows": method}
    write_object(folder / "config.json", mapped)
    generation = source / "generation_config.json"
    if generation.exists():
        write_object(folder / generation.name, remap_ids(read_object(generation), ids, str(generation)))


def _copy_texts(source: Path, folder: Path) -> None:
    """The base tokenizer's files (the patch is a second stage behind it) and the licence."""
    if not (source / "tokenizer.json").is_file():
        raise LoadError(f"{source / 'tokenizer.json'}: is missing; a model folder needs it")
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _check_result(folder: Path, rows: int) -> None:
    """Open what was written as any reader would: whole files, and the rows that config.json promises."""
    with open_weights(folder) as weights:
        for name in filter(None, (_find(weights, INPUT_ENDINGS, "embedding"), _find_head(weights))):
            assert weights.shape(name)[0] == rows
        assert read_object(folder / "config.json")["vocab_size"] == rows


@contextlib.contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """A fresh folder on the target's file system, removed if it was not renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"--out {target}: cannot be made: {error.strerror or error}; give another folder") from None
    try:
        yield scratch
    except OSError as error:
        raise ConfigError(f"--out {target}: cannot be written: {error.strerror or error}; free some space or give "
                          "another folder") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, target: Path) -> None:
    """Make the scratch folder durable and give it its name."""
    for path in [*scratch.rglob("*"), scratch]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    scratch.chmod(0o755)
    scratch.rename(target)  # over an empty folder too; a folder that is not empty any more makes it fail


@contextlib.contextmanager
def _bar(label: str, total_bytes: int, wanted: bool) -> Iterator[Progress]:
    """A tqdm bar in bytes on stderr, or nothing."""
    if not wanted:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, total=total_bytes, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield lambda nbytes: cast(None, bar.update(nbytes))


# -------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scripts.patch apply`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, .gguf file or hub id")
    parser.add_argument("--patch", required=True, metavar="DIR", help="folder of the patch artefact")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--method", choices=METHODS, default="exp",
                        help="how an n-gram's rows follow from its tokens' rows (default: %(default)s)")
    tying = parser.add_mutually_exclusive_group()
    tying.add_argument("--untie", action="store_true",
                       help="give a tied model a head of its own also with --method mean (exp always does)")
    tying.add_argument("--keep-tied", choices=("input", "output"), default=None,
                       help="keep a tied model tied and use the rows of this side in both places")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Apply as the flags say; prints the report as one JSON line. Raises ConfigError or LoadError."""
    folder = resolve_model(args.model, progress=not args.no_progress)
    artefact = read(Path(args.patch), base_tokenizer_folder=folder)
    tying: Tying = "untie" if args.untie else args.keep_tied or "auto"
    report = apply_patch(folder, artefact, args.out, method=args.method, tying=tying, progress=not args.no_progress)
    if report.tied_before and not report.tied_after:
        print(f"the model was tied; its head is a matrix of its own now: {report.extra_bytes} bytes more",
              file=sys.stderr)
    print(json.dumps(asdict(report)))
    return 0
