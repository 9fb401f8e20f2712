"""Tensors by name out of one or several safetensors files, mapped, not read: WeightSource.

It does not know what the names mean, and it opens nothing but safetensors: formats that can hold code
(`.bin`, `.pt`, `.pth`) are refused with the way to convert them (rule R3). Torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.core.errors import LoadError
from engine.loading.safetensors_header import TensorInfo, read_header
from engine.tokenization.jsonfile import read_object

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class WeightSource:
    """The tensors of a model folder. Use as a context manager or close(); tensors handed out stay valid after it.

    A tensor is a view of a private file mapping: pages are read when they are first touched, and writing to one
    changes neither the file nor another process.
    """

    def __init__(self, folder: Path, files: dict[str, Path], infos: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self._files = files
        self._infos = infos
        self._open: dict[Path, Any] = {}

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in elements. Raises LoadError when the checkpoint has no such tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors spells it (BF16, F16, F32, ...). Raises LoadError for an unknown name."""
        return self._info(name).dtype

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises LoadError for an unknown name."""
        self._info(name)
        return self._files[name]

    def get(self, name: str) -> torch.Tensor:
        """The tensor, in its stored dtype, on the CPU. Raises LoadError naming tensor and file."""
        self._info(name)
        path = self._files[name]
        try:
            handle = self._open.get(path)
            if handle is None:
                from safetensors import safe_open

                handle = self._open[path] = safe_open(str(path), framework="pt", device="cpu")
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor
        except Exception as error:  # the library's own type, OSError, or torch's RuntimeError on a bad mapping
            raise LoadError(f"{path}: tensor {name!r} cannot be read: {_one_line(error)}") from None

    def expect(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """get(name) after comparing its shape. Raises LoadError naming tensor, found and wanted shape."""
        found = self.shape(name)
        if found != tuple(shape):
            raise LoadError(f"{self._files[name]}: tensor {name!r} has shape {found}, config.json makes it "
                            f"{tuple(shape)}; weights and config.json do not belong together")
        return self.get(name)

    def close(self) -> None:
        """Drop the file handles. Idempotent."""
        self._open.clear()

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise LoadError(f"{self.folder}: tensor {name!r} is missing from the checkpoint, which has "
                            f"{len(self._infos)} tensors; the download is incomplete or the architecture differs")
        return info


def open_weights(path: str | Path) -> WeightSource:
    """The weights of a model folder (model.safetensors, or shards with their index).

    Every header is checked against its file's length here, so that a truncated or damaged file is found before
    anything is computed. Raises LoadError, one line: file and reason.
    """
    folder = Path(path)
    shards = _shards(folder)
    files: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    for file, listed in shards.items():
        found = read_header(file)
        absent = sorted(listed - found.keys())
        if absent:
            raise LoadError(f"{file}: tensor {absent[0]!r} is missing; {INDEX_NAME} says it is in there")
        for name, info in found.items():
            if name in infos:
                raise LoadError(f"{file}: tensor {name[:120]!r} is also in {files[name].name}; remove one of them")
            files[name] = file
            infos[name] = info
    if not infos:
        raise LoadError(f"{folder}: its safetensors files hold no tensors")
    return WeightSource(folder, files, infos)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """File -> names that the index promises in it (none promised without an index)."""
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_shards(folder, index)
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return {file: set() for file in found}
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise LoadError(f"{folder}: has {pickled[0]} but no safetensors; pickled checkpoints can run code and are "
                        "refused. Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR)"
                        ".save_pretrained(OUT)")
    raise LoadError(f"{folder}: has no *.safetensors file")


def _indexed_shards(folder: Path, index: Path) -> dict[Path, set[str]]:
    """The shards an index names, each a plain file name inside the folder."""
    weight_map = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index}: weight_map is not an object of tensor name to file name")
    shards: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and file_name.endswith(".safetensors")
        if not plain or "/" in file_name or "\\" in file_name or "\0" in file_name:
            raise LoadError(f"{index}: {str(file_name)[:80]!r} is not the name of a safetensors file beside it")
        shards.setdefault(folder / file_name, set()).add(name)
    missing = sorted(file.name for file in shards if not file.is_file())
    if missing:
        raise LoadError(f"{index}: names {missing[0][:80]}, which is not in the folder ({len(missing)} of "
                        f"{len(shards)} shards are missing); the download is incomplete")
    return shards


def _one_line(error: BaseException) -> str:
    """An exception's first line, bounded."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
