"""Name -> variant, one file per variant: adding a policy, model or backend is adding a file.

A registry scans its package's files for `register("name")` and imports only the file it needs. It does not know what
the variants do.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from engine.core.errors import ConfigError, InvariantError

T = TypeVar("T")
_REGISTRATION = re.compile(r"""^@?\w*\.?register\(["']([^"']+)["']\)""", re.MULTILINE)


class Registry(Generic[T]):
    """Variants of one seam, e.g. `policies = Registry("policy", "engine.core.policies")`.

    `registry["sarathi"]` imports the file that says `@policies.register("sarathi")` and returns what it decorates.
    A miss is a ConfigError that lists the known names and the nearest one.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._found: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: file a variant under its name. Returns it unchanged; a second one of that name is a bug."""

        def file(variant: T) -> T:
            if name in self._found:
                raise InvariantError(f"{self.kind} {name!r} is registered twice")
            self._found[name] = variant
            return variant

        return file

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Name -> the module that registers it, read from the files' text."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.submodule_search_locations is None:
            raise InvariantError(f"{self.package} is not a package")
        files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.py"))
        return {
            name: f"{self.package}.{file.stem}"
            for file in files
            if file.stem != "__init__"
            for name in _REGISTRATION.findall(file.read_text(encoding="utf-8"))
        }

    def names(self) -> list[str]:
        """Every variant's name; imports none of them."""
        return sorted(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            known = self.names()
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{self.kind} {name!r} is unknown; known: {', '.join(known)}{hint}")
            importlib.import_module(self._modules[name])
        return self._found[name]
