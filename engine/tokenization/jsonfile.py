"""Read and write the small JSON files of a model folder; every fault is a LoadError of one line.

It does not know what any key means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.errors import LoadError

MAX_CONFIG_BYTES = 4 << 20
"""config.json, generation_config.json, tokenizer_config.json: real ones have at most about 200 KiB."""


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """Content of a regular file of at most `limit_bytes`. Raises LoadError naming file, size and limit."""
    try:
        found_bytes = path.stat().st_size
        if not path.is_file():
            raise LoadError(f"{path}: is not a regular file")
        if found_bytes > limit_bytes:
            raise LoadError(f"{path}: has {found_bytes} bytes, above the limit of {limit_bytes}")
        return path.read_bytes()
    except FileNotFoundError:
        raise LoadError(f"{path}: is missing; a model folder needs it") from None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_object(raw: bytes, origin: str) -> dict[str, Any]:
    """The JSON object in `raw`. `origin` names it in the error. Raises LoadError for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise LoadError(f"{origin}: is nested too deeply to be a configuration") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and over-long integers are ValueErrors
        raise LoadError(f"{origin}: is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{origin}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_object(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises LoadError naming the file and what is wrong."""
    return parse_object(read_bytes(path, limit_bytes), str(path))


def read_optional_object(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """As read_object, but {} when there is no such file."""
    return read_object(path, limit_bytes) if path.exists() else {}


def write_object(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object, readable, UTF-8, with a final newline."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
