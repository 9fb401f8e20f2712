"""A patched vocabulary on disk: write, read.

Two files in a folder: patch.json (format, version, kind, hash of the base, counts, meta) and patch.safetensors
(int32 arrays), bound to each other by length and SHA-256. Nothing in them is code. Formats: docs/vocabularies.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.core.errors import LoadError
from engine.loading.safetensors_header import read_header, write_file
from engine.patching.artefact import FORMAT, KINDS, VERSION, Artefact, to_arrays
from engine.patching.base import BaseVocabulary, load_base
from engine.patching.errors import ArraysMismatch, MalformedFile, MissingFile, TruncatedFile, UnknownVersion
from engine.patching.invariants import check
from engine.patching.place import ARRAYS_NAME, JSON_NAME, MAX_JSON_BYTES, find
from engine.tokenization.jsonfile import read_object

MAX_ARRAYS_BYTES = 256 << 20
MAX_VOCAB = 1 << 24
_ARRAYS = ("merges", "new_id_of", "ngram_ids", "ngram_offsets", "ngram_parts", "old_offsets", "old_parts",
           "removed_ids", "removed_offsets", "removed_parts")  # fmt: skip


def write(artefact: Artefact, folder: str | Path) -> None:
    """Write patch.json and patch.safetensors; the same artefact gives the same bytes on every machine."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    arrays = to_arrays(artefact)
    arrays_path = place / ARRAYS_NAME
    write_file(arrays_path, [(name, "I32", arrays[name].shape) for name in _ARRAYS],
               (arrays[name].tobytes() for name in _ARRAYS))
    raw = arrays_path.read_bytes()
    value = {
        "format": FORMAT, "version": VERSION, "kind": artefact.kind, "sha256": artefact.sha256,
        "base": {"sha256": artefact.base_sha256, "vocab_size": artefact.base_vocab_size},
        "vocab_size": artefact.vocab_size, "removed": len(artefact.removed), "ngrams": len(artefact.ngrams),
        "arrays": {"file": ARRAYS_NAME, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
        "meta": artefact.meta,
    }  # fmt: skip
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    (place / JSON_NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: str | Path, base_tokenizer_folder: str | Path | None = None,
         base: BaseVocabulary | None = None) -> Artefact:
    """The artefact of a folder (or of its subfolder `patch`), every invariant checked; those that need the base's text
    only when it is given, as a tokenizer folder or loaded. Raises a subclass of ArtefactError (errors.py) naming the
    file and the reason.
    """
    place = find(folder) or Path(folder)
    value = _read_json(place / JSON_NAME)
    arrays = _read_arrays(place / ARRAYS_NAME, value["arrays"])
    try:
        artefact = _from_arrays(value, arrays)
    except (ValueError, IndexError) as error:
        raise MalformedFile(f"{place / ARRAYS_NAME}: {str(error)[:160]}") from None
    if artefact.vocab_size != value["vocab_size"]:
        raise MalformedFile(f"{place / JSON_NAME}: vocab_size is {value['vocab_size']}, the arrays hold "
                            f"{artefact.vocab_size} ids")
    if base is None and base_tokenizer_folder is not None:
        base = load_base(base_tokenizer_folder)
    check(artefact, base, str(place))
    if artefact.sha256 != value["sha256"]:
        raise ArraysMismatch(f"{place / JSON_NAME}: its sha256 is not that of the vocabulary beside it; "
                             "one of the two files was changed")
    return artefact


def _rows(name: str, arrays: Mapping[str, npt.NDArray[np.int32]]) -> list[tuple[int, ...]]:
    """_ragged undone: rising offsets tile the items, so nothing grows. Raises ValueError for others."""
    offsets, parts = arrays[f"{name}_offsets"], arrays[f"{name}_parts"].tolist()
    if not offsets.size or offsets[0] != 0 or offsets[-1] != len(parts) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name}_offsets do not run from 0 to {len(parts)}")
    bounds = offsets.tolist()
    return [tuple(parts[begin:end]) for begin, end in itertools.pairwise(bounds)]


def _from_arrays(value: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[np.int32]]) -> Artefact:
    """The dataclass of two files read. Raises ValueError for arrays that do not fit each other."""
    base_size = value["base"]["vocab_size"]
    if arrays["new_id_of"].size != base_size:
        raise ValueError(f"new_id_of has {arrays['new_id_of'].size} entries, the base {base_size} ids")
    removed_ids, parts = arrays["removed_ids"].tolist(), _rows("removed", arrays)
    if len(parts) != len(removed_ids) or len(set(removed_ids)) != len(removed_ids):
        raise ValueError("removed_ids and removed_offsets are not one entry a removed token")
    new_id_of = {token: new for token, new in enumerate(arrays["new_id_of"].tolist()) if new != -1}
    return Artefact(value["base"]["sha256"], base_size, value["kind"], dict(zip(removed_ids, parts, strict=True)),
                    tuple(_rows("ngram", arrays)), tuple(_rows("old", arrays)), new_id_of,
                    tuple(arrays["ngram_ids"].tolist()), value["meta"],
                    tuple((left, right) for left, right in arrays["merges"].reshape(-1, 2).tolist()))


def _read_json(path: Path) -> dict[str, Any]:
    """patch.json with its fields' types checked."""
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; give a folder that `python -m scripts.patch` wrote")
    try:
        value = read_object(path, MAX_JSON_BYTES)
    except LoadError as error:
        raise MalformedFile(str(error)) from None
    if value.get("format") != FORMAT:
        raise MalformedFile(f"{path}: format is {str(value.get('format'))[:40]!r}, not {FORMAT!r}")
    if value.get("version") != VERSION or value.get("kind") not in KINDS:
        raise UnknownVersion(f"{path}: version {str(value.get('version'))[:20]}, kind {str(value.get('kind'))[:40]!r}; "
                             f"this engine reads version {VERSION} of {' and '.join(KINDS)}")
    base, arrays = value.get("base"), value.get("arrays")
    wanted: Iterable[tuple[Any, str, type]] = (
        (value, "vocab_size", int), (value, "sha256", str), (value, "meta", dict), (base, "sha256", str),
        (base, "vocab_size", int), (arrays, "bytes", int), (arrays, "sha256", str))
    for place, name, kind in wanted:
        if not isinstance(place, dict) or type(place.get(name)) is not kind:
            raise MalformedFile(f"{path}: field {name} is missing or not a {kind.__name__}")
    for place in (value, value["base"]):
        if not 0 < place["vocab_size"] <= MAX_VOCAB:
            raise MalformedFile(f"{path}: vocab_size is {place['vocab_size']}; allowed: 1..{MAX_VOCAB}")
    return value


def _read_arrays(path: Path, promised: Mapping[str, Any]) -> dict[str, npt.NDArray[np.int32]]:
    """The arrays, after the file's length and hash were found to be those promised."""
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; it belongs to {JSON_NAME}")
    found_bytes = path.stat().st_size
    if found_bytes > MAX_ARRAYS_BYTES:
        raise MalformedFile(f"{path}: has {found_bytes} bytes; allowed: {MAX_ARRAYS_BYTES}")
    raw = path.read_bytes()
    if len(raw) != promised["bytes"]:
        raise TruncatedFile(f"{path}: has {len(raw)} bytes, {JSON_NAME} promises {promised['bytes']}; copy it again")
    if hashlib.sha256(raw).hexdigest() != promised["sha256"]:
        raise ArraysMismatch(f"{path}: its SHA-256 is not the one in {JSON_NAME}; copy both again")
    try:
        header = read_header(path)
    except LoadError as error:
        raise MalformedFile(str(error)) from None
    data_begin = 8 + int.from_bytes(raw[:8], "little")
    arrays = {}
    for name in _ARRAYS:
        info = header.get(name)
        shaped = info is not None and (len(info.shape) == 1 or (name == "merges" and info.shape[1:] == (2,)))
        if info is None or not shaped or info.dtype != "I32":
            raise MalformedFile(f"{path}: array {name} is missing or not a row of int32")
        data = raw[data_begin + info.begin : data_begin + info.end]
        arrays[name] = np.frombuffer(data, "<i4").reshape(info.shape)
    return arrays
