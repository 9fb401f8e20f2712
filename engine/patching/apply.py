"""`python -m scripts.patch apply`: a model folder and a patch become the model folder of the patched vocabulary.

Only embedding, head and ids change; every other tensor is copied byte by byte, one at a time. It knows the layout
of Hugging Face folders; the rows' formulas are embeddings.py's, the ids' keys config_ids.py's, and what an artefact
promises artefact.py's. No torch: bytes in, bytes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.core.errors import ConfigError, LoadError
from engine.loading.resolve import resolve_model
from engine.loading.weights import WeightSource, open_weights
from engine.patching.artefact import Artefact
from engine.patching.artefact_files import read, write
from engine.patching.config_ids import IdMap, remap_ids
from engine.patching.embeddings import METHODS, NUMPY_DTYPES, Method, Side, patched_matrix
from engine.patching.model_folder import (
    OutTensor,
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
from engine.tokenization.jsonfile import read_object, write_object

INPUT_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_ENDINGS = ("lm_head.weight", "embed_out.weight")
HEAD_NAME = "lm_head.weight"
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
    refuse_existing(target)
    config = read_object(source_folder / "config.json")
    if find(source_folder) is not None or "tessera_patch" in config:
        raise LoadError(f"{source_folder}: is patched already: its rows are no longer the base tokenizer's; apply to "
                        "the model that it was made from")
    with open_weights(source_folder) as weights, scratch_beside(target) as scratch:
        plan = _plan(weights, config, artefact, method, tying)
        _write_configs(source_folder, scratch, config, artefact, plan.tied_after, method)
        total_bytes = sum(tensor.nbytes for tensor in plan.tensors)
        made = {name: functools.partial(_new_rows, plan.named(name), weights, artefact, method, side)
                for name, side in plan.sides.items()}
        with byte_bar(f"applying {method} rows", total_bytes, progress) as advance:
            write_weights(scratch, weights, plan.tensors, made, advance)
        copy_texts(source_folder, scratch)
        write(artefact, scratch / FOLDER_NAME)
        _check_result(scratch, artefact.vocab_size)
        publish(scratch, target)
        embedding = _find(weights, INPUT_ENDINGS, "embedding")
        return ApplyReport(
            out=str(target), method=method, dtype=weights.dtype(embedding), rows_before=weights.shape(embedding)[0],
            rows_after=artefact.vocab_size, ngram_rows=sum(len(old) > 1 for old in artefact.old_ids),
            tied_before=plan.tied_before, tied_after=plan.tied_after, extra_bytes=plan.extra_bytes,
            total_bytes=total_bytes,
        )


# -------------------------------------------------------------------- which tensors


@dataclass(frozen=True, slots=True)
class _Plan:
    """Output tensors; which of them get new rows, of which side; whether head and embedding are one matrix."""

    tensors: list[OutTensor]
    sides: dict[str, Side]
    tied_before: bool
    tied_after: bool

    def named(self, name: str) -> OutTensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    @property
    def extra_bytes(self) -> int:
        """Of the head that untying adds."""
        if self.tied_after or not self.tied_before:
            return 0
        return sum(tensor.nbytes for tensor in self.tensors if tensor.source != tensor.name)


def _plan(weights: WeightSource, config: dict[str, Any], artefact: Artefact, method: Method, tying: Tying) -> _Plan:
    """What to write. A tied model's copy of the head in the file counts as absent."""
    embedding, head = _find(weights, INPUT_ENDINGS, "embedding"), _find_head(weights)
    tied = _is_tied(weights, config, head)
    if not tied and tying in ("input", "output"):
        raise ConfigError(f"--keep-tied {tying}: this model's head and embedding are two matrices; leave it out")
    tied_after = tied and (tying in ("input", "output") or (method == "mean" and tying == "auto"))
    _check_rows(weights, embedding, config, artefact)
    if head is not None and not tied:
        _check_rows(weights, head, config, artefact)
    sides: dict[str, Side] = {embedding: "output" if tied_after and tying == "output" else "input"}
    head_name = head or HEAD_NAME
    bias = head_name.removesuffix(".weight") + ".bias"
    sides.update({name: "output" for name in (head_name, bias) if name in weights})
    tensors = [copy_of(weights, name) for name in weights.names()]
    if tied:  # loading would overwrite a stored head by the embedding; what it holds is nobody's
        tensors = [tensor for tensor in tensors if tensor.name != head_name]
        sides.pop(head_name, None)
    if tied and not tied_after:
        tensors.append(dataclasses.replace(copy_of(weights, embedding), name=head_name))
        sides[head_name] = "output"
    tensors = [dataclasses.replace(tensor, shape=(artefact.vocab_size, *tensor.shape[1:])) if tensor.name in sides
               else tensor for tensor in tensors]
    return _Plan(tensors, sides, tied, tied_after)


def _is_tied(weights: WeightSource, config: dict[str, Any], head: str | None) -> bool:
    """What config.json says, or, where it says nothing, whether a head is stored."""
    tied = config.get("tie_word_embeddings", head is None)
    if not isinstance(tied, bool):
        raise LoadError(f"{weights.folder / 'config.json'}: tie_word_embeddings={str(tied)[:40]!r} is not true or "
                        "false")
    if not tied and head is None:
        raise LoadError(f"{weights.folder}: tie_word_embeddings is false, but the checkpoint has no head tensor "
                        f"({' or '.join(OUTPUT_ENDINGS)}); weights and config.json do not belong together")
    return tied


def _check_rows(weights: WeightSource, name: str, config: dict[str, Any], artefact: Artefact) -> None:
    """A matrix must have a row for every base id; rows beyond the vocabulary are padding."""
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


def _new_rows(tensor: OutTensor, weights: WeightSource, artefact: Artefact, method: Method, side: Side,
              raw: Raw) -> Raw:
    """The bytes of an embedding, head or bias of the patched vocabulary, from those of the base's."""
    numbers = np.frombuffer(raw, NUMPY_DTYPES[tensor.dtype]).reshape(weights.shape(tensor.source))
    made = patched_matrix(numbers, tensor.dtype, artefact.old_ids, method, side)
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8)


def _write_configs(source: Path, folder: Path, config: dict[str, Any], artefact: Artefact, tied: bool,
                   method: Method) -> None:
    """config.json and generation_config.json, their ids mapped."""
    ids = IdMap(artefact.new_id_of, artefact.removed, artefact.base_vocab_size)
    mapped = remap_ids(config, ids, str(source / "config.json"))
    mapped["vocab_size"] = artefact.vocab_size
    mapped["tie_word_embeddings"] = tied
    mapped["tessera_patch"] = {"folder": FOLDER_NAME, "base_sha256": artefact.base_sha256, "rows": method}
    write_object(folder / "config.json", mapped)
    generation = source / "generation_config.json"
    if generation.exists():
        write_object(folder / generation.name, remap_ids(read_object(generation), ids, str(generation)))


def _check_result(folder: Path, rows: int) -> None:
    """Open what was written as any reader would: whole files, and the rows that config.json promises."""
    with open_weights(folder) as weights:
        for name in filter(None, (_find(weights, INPUT_ENDINGS, "embedding"), _find_head(weights))):
            assert weights.shape(name)[0] == rows
        assert read_object(folder / "config.json")["vocab_size"] == rows


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
