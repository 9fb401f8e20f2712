"""Writing a model folder from another one: tensors streamed, texts copied, the whole published by one rename.

It does not know which tensors change or why; who calls gives a function for each that does. No torch: bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from engine.core.errors import ConfigError, LoadError
from engine.loading.safetensors_header import ELEMENT_BYTES, read_header, write_file
from engine.loading.weights import INDEX_NAME, WeightSource
from engine.tokenization.jsonfile import write_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model")
OTHER_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")

Raw: TypeAlias = "npt.NDArray[np.uint8]"
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor to write: its file's name, its name, stored dtype, shape, and the checkpoint's tensor it is of."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


def copy_of(weights: WeightSource, name: str) -> OutTensor:
    """The tensor as it is, in a file of the same name."""
    return OutTensor(weights.file_of(name).name, name, weights.dtype(name), weights.shape(name), name)


def write_weights(folder: Path, weights: WeightSource, plan: Sequence[OutTensor],
                  made: Mapping[str, Callable[[Raw], Raw]], advance: Progress) -> None:
    """Write the planned tensors in the source's files, and the index where there are several or was one.

    made: name of an output tensor -> its bytes from its source's bytes; what is not in it is copied. One tensor is
    in memory at a time. advance: called with the bytes of each tensor written.
    """
    mapped: dict[Path, tuple[Raw, dict[str, tuple[int, int]]]] = {}

    def chunks(tensors: Sequence[OutTensor]) -> Iterator[bytes]:
        for tensor in tensors:
            path = weights.file_of(tensor.source)
            if path not in mapped:
                mapped.clear()  # one source file is mapped at a time
                mapped[path] = _map_file(path)
            data, places = mapped[path]
            begin, end = places[tensor.source]
            make = made.get(tensor.name)
            yield cast(bytes, memoryview(data[begin:end] if make is None else make(data[begin:end])))
            advance(tensor.nbytes)

    files: dict[str, list[OutTensor]] = {}
    for tensor in plan:
        files.setdefault(tensor.file, []).append(tensor)
    for file, tensors in files.items():
        write_file(folder / file, [(t.name, t.dtype, t.shape) for t in tensors], chunks(tensors))
    if set(files) != {"model.safetensors"}:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan)},
                 "weight_map": {tensor.name: tensor.file for tensor in plan}}
        write_object(folder / INDEX_NAME, index)


def _map_file(path: Path) -> tuple[Raw, dict[str, tuple[int, int]]]:
    """(the file's bytes, mapped; tensor name -> [begin, end) in them)."""
    infos = read_header(path)
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    return data, {name: (start + info.begin, start + info.end) for name, info in infos.items()}


def copy_texts(source: Path, folder: Path) -> None:
    """The base tokenizer's files (a patch is a second stage behind it) and the licence."""
    if not (source / "tokenizer.json").is_file():
        raise LoadError(f"{source / 'tokenizer.json'}: is missing; a model folder needs it")
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def refuse_existing(target: Path) -> None:
    """Raise ConfigError for a place that holds something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {target}: exists already; give a new folder, or remove it first")


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A fresh folder on the target's file system, removed if it was not renamed. OSError becomes ConfigError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"{target}: cannot be made: {error.strerror or error}; give another folder") from None
    try:
        yield scratch
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror or error}; free some space or give "
                          "another folder") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, target: Path) -> None:
    """Make the scratch folder durable and give it its name; an empty folder of that name is replaced."""
    for path in [*scratch.rglob("*"), scratch]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    scratch.chmod(0o755)
    scratch.rename(target)


@contextlib.contextmanager
def byte_bar(label: str, total_bytes: int, wanted: bool) -> Iterator[Progress]:
    """A tqdm bar in bytes on stderr, or nothing."""
    if not wanted:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, total=total_bytes, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield lambda nbytes: cast(None, bar.update(nbytes))
