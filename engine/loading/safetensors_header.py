"""The header of a safetensors file, read and checked against the file's length without torch or mmap (rule R22).

Layout: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then
the data; offsets count from the data's start. Source: the format page of huggingface/safetensors.
It does not hand out tensors; weights.py does.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from engine.core.errors import LoadError
from engine.tokenization.jsonfile import parse_object

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMENSIONS = 8

# bytes an element; the names are the format's. What the engine cannot use is still a well-formed file.
ELEMENT_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
}
TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype as the format spells it, shape in elements, where its bytes are in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, each of its sizes checked against the file's length.

    Raises LoadError, one line, naming the file and the reason (truncated, header damaged, sizes that do not fit).
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise LoadError(f"{path}: has {file_bytes} bytes, too few for a safetensors file; fetch it again")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise LoadError(f"{path}: says its header has {header_bytes} bytes, but the file has "
                                f"{file_bytes}; it is truncated or no safetensors file; fetch it again")
            raw = file.read(header_bytes)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror or error}") from None
    entries = parse_object(raw, f"{path}: safetensors header")
    entries.pop("__metadata__", None)
    infos = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    _check_cover(path, infos, file_bytes - 8 - header_bytes)
    return infos


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    """One header entry, types and product checked."""
    where = f"{path}: tensor {name[:120]!r}"
    if not isinstance(entry, dict):
        raise LoadError(f"{where}: its header entry is not an object; the file is damaged")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise LoadError(f"{where}: dtype {str(dtype)[:40]!r} is unknown; known: {', '.join(ELEMENT_BYTES)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise LoadError(f"{where}: shape {str(shape)[:80]} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise LoadError(f"{where}: data_offsets {str(offsets)[:80]} are not [begin, end]")
    wanted_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted_bytes:
        raise LoadError(f"{where}: shape {tuple(shape)} of {dtype} needs {wanted_bytes} bytes, "
                        f"its offsets hold {offsets[1] - offsets[0]}; the file is damaged")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """A list of non-negative integers below 2**63."""
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in value
    )


def _check_cover(path: Path, infos: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must tile the data exactly: no hole, no overlap, nothing beyond the end."""
    reached = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != reached:
            raise LoadError(f"{path}: tensor {name[:120]!r} begins at byte {info.begin} of the data instead of "
                            f"{reached}; the file is damaged")
        reached = info.end
    if reached != data_bytes:
        raise LoadError(f"{path}: holds {data_bytes} bytes of data, its header describes {reached}; "
                        "it is truncated or damaged; fetch it again")


def stored_dtype(folder: Path) -> str:
    """Torch's name for the dtype of most elements of the folder's first safetensors file; float32 without any."""
    for path in sorted(folder.glob("*.safetensors")):
        elements: dict[str, int] = {}
        for info in read_header(path).values():
            elements[info.dtype] = elements.get(info.dtype, 0) + math.prod(info.shape)
        if elements:
            stored = max(elements, key=lambda dtype: elements[dtype])
            return TORCH_NAMES.get(stored, stored)
    return "float32"


def write_file(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], chunks: Iterable[bytes]) -> None:
    """Write a safetensors file without holding it in memory, and fsync it.

    tensors: (name, dtype as the format spells it, shape) in file order; chunks: the bytes of each, in that order.
    Raises ValueError when a chunk's length is not what its shape and dtype need.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: list[int] = []
    reached = 0
    for name, dtype, shape in tensors:
        sizes.append(math.prod(shape) * ELEMENT_BYTES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [reached, reached + sizes[-1]]}
        reached += sizes[-1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins 8-byte aligned, so that a mapped tensor is too
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, _, _), wanted_bytes, chunk in zip(tensors, sizes, chunks, strict=True):
            if len(chunk) != wanted_bytes:
                raise ValueError(f"tensor {name!r} came with {len(chunk)} bytes instead of {wanted_bytes}")
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
