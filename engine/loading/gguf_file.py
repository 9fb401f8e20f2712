"""A GGUF file's metadata and tensors, every declared size checked against the file's length first (rule R22).

The header is parsed here, in Python integers, because the `gguf` package's reader trusts the counts it finds (a
flipped bit makes it loop or exhaust memory) and needs seconds for a vocabulary; block sizes and dequantisation are
the package's. It does not know what the keys and tensors mean; gguf.py does.
Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import LoadError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 24
MAX_DIMENSIONS = 4
MAX_ALIGNMENT_BYTES = 1 << 20

# value type -> struct code; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape outermost first, type name as ggml spells it (F32, Q4_1, ...), where its bytes are."""

    name: str
    type_name: str
    type_id: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufFile:
    """An open GGUF file: `metadata` (key -> value), `tensors` (name -> GgufTensor), data on demand.

    Raises LoadError naming file and reason for anything that is not a well-formed file whose sizes fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise LoadError(f"{self.path}: cannot be read: {error}") from None
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._offset = 0
        try:
            self._parse()
        except BaseException:
            self._data.close()
            raise

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor as stored: float32, float16 or uint16 (the bits of BF16) in its shape, or its raw blocks as
        bytes (rows, bytes a row)."""
        import numpy as np

        tensor = self.tensors[name]
        kinds: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
        dtype = kinds.get(tensor.type_name, np.dtype("u1"))
        flat = np.frombuffer(self._data, dtype, tensor.nbytes // dtype.itemsize, tensor.begin)
        if tensor.type_name in kinds:
            return flat.reshape(tensor.shape)
        rows = math.prod(tensor.shape[:-1])
        return flat.reshape(rows, tensor.nbytes // rows)

    def dequantised(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32 in its shape, exactly as ggml defines the values. Raises LoadError for a type that
        the gguf package cannot dequantise."""
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        stored = self.array(name)
        if tensor.type_name in ("F32", "F16"):
            return stored.astype(np.float32)
        if tensor.type_name == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        try:
            with np.errstate(all="ignore"):
                values = dequantize(stored, GGMLQuantizationType(tensor.type_id))
        except NotImplementedError:
            raise LoadError(f"{self.path}: tensor {name!r} has type {tensor.type_name}, which cannot be "
                            "dequantised; use another quantisation of this model") from None
        return values.reshape(tensor.shape)

    def close(self) -> None:
        """Unmap. Idempotent; while an array of this file is alive, the mapping stays and goes with it."""
        try:
            self._data.close()
        except BufferError:
            return

    # ---------------------------------------------------------------- parsing

    def _fail(self, what: str) -> LoadError:
        return LoadError(f"{self.path}: {what}; the file is truncated or damaged, fetch it again")

    def _take(self, nbytes: int) -> int:
        """Advance by nbytes, which must be in the file. Returns where they begin."""
        begin = self._offset
        if nbytes > len(self._data) - begin:
            raise self._fail(f"{nbytes} bytes are declared at byte {begin}, the file has {len(self._data)}")
        self._offset = begin + nbytes
        return begin

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._data, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, code: str, limit: int, what: str) -> int:
        value = int(self._scalar(code))
        if value > limit:
            raise self._fail(f"{what} {value} is above {limit}")
        return value

    def _string(self) -> str:
        size = self._count("Q", MAX_STRING_BYTES, "string length")
        begin = self._take(size)
        try:
            return self._data[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"the string at byte {begin} is not UTF-8") from None

    def _value(self, kind: int, nested: bool = False) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY or nested:
            raise self._fail(f"value type {kind} at byte {self._offset} is unknown")
        item_kind = int(self._scalar("I"))
        count = self._count("Q", MAX_ARRAY_ITEMS, "array length")
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            begin = self._take(count * struct.calcsize("<" + code))
            return list(struct.unpack_from(f"<{count}{code}", self._data, begin))
        if count * 8 > len(self._data) - self._offset:  # a string needs 8 bytes at least
            raise self._fail(f"an array of {count} strings is declared at byte {self._offset}")
        read: Callable[[], Any] = self._string if item_kind == _STRING else lambda: self._value(item_kind, True)
        return [read() for _ in range(count)]

    def _parse(self) -> None:
        begin = self._take(4)
        if self._data[begin : begin + 4] != MAGIC:
            raise LoadError(f"{self.path}: does not begin with {MAGIC.decode()}: it is no GGUF file")
        version = int(self._scalar("I"))
        if version not in (2, 3):
            raise LoadError(f"{self.path}: has GGUF version {version}; supported: 2 and 3, little-endian")
        tensor_count = self._count("Q", MAX_TENSORS, "tensor count")
        key_count = self._count("Q", MAX_KEYS, "key count")
        for _ in range(key_count):
            key = self._string()
            if key in self.metadata:
                raise self._fail(f"key {key[:80]!r} is there twice")
            self.metadata[key] = self._value(int(self._scalar("I")))
        alignment = self.metadata.get("general.alignment", 32)
        sized = isinstance(alignment, int) and 1 <= alignment <= MAX_ALIGNMENT_BYTES
        if not sized or alignment & (alignment - 1):
            raise self._fail(f"general.alignment={alignment!r} is not a power of two up to {MAX_ALIGNMENT_BYTES}")
        declared = [self._tensor_entry() for _ in range(tensor_count)]
        data_begin = -(-self._offset // alignment) * alignment
        for name, type_id, shape, offset in declared:
            if name in self.tensors:
                raise self._fail(f"tensor {name[:80]!r} is there twice")
            self.tensors[name] = self._place(name, type_id, shape, offset, data_begin, alignment)

    def _tensor_entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._count("I", MAX_DIMENSIONS, "number of dimensions")
        innermost_first = [int(self._scalar("Q")) for _ in range(dimensions)]
        type_id = int(self._scalar("I"))
        return name, type_id, tuple(reversed(innermost_first)), int(self._scalar("Q"))

    def _place(self, name: str, type_id: int, shape: tuple[int, ...], offset: int, data_begin: int,
               alignment: int) -> GgufTensor:
        """Check one tensor's type, shape and place against the file's length."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        where = f"tensor {name[:80]!r}"
        if type_id not in set(GGMLQuantizationType):
            raise self._fail(f"{where} has unknown type {type_id}")
        kind = GGMLQuantizationType(type_id)
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or min(shape) < 1 or shape[-1] % block_elements:
            raise self._fail(f"{where} has shape {shape}, which {kind.name} cannot hold")
        nbytes = math.prod(shape) // block_elements * block_bytes
        if offset % alignment or data_begin + offset + nbytes > len(self._data):
            raise self._fail(f"{where} needs {nbytes} bytes at byte {data_begin + offset}, "
                             f"the file has {len(self._data)}")
        return GgufTensor(name, kind.name, type_id, shape, data_begin + offset, nbytes)
