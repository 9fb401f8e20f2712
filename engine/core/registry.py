"""Name -> variant, one file per variant, found by importing the file of that name.

A registry knows a package; it does not know what the variants do.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from engine.core.errors import ConfigError, InvariantError

T = TypeVar("T")


class Registry(Generic[T]):
    """Variants of one seam, e.g. `policies = Registry("policy", "engine.core.policies")`.

    `registry["sarathi"]` imports `engine.core.policies.sarathi` and returns what it registered under that name.
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

    def names(self) -> list[str]:
        """Every variant's name, from the files of the package (underscored files are helpers); imports none."""
        package = importlib.import_module(self.package)
        return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            known = self.names()
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{self.kind} {name!r} is unknown; known: {', '.join(known)}{hint}")
            importlib.import_module(f"{self.package}.{name}")
            if name not in self._found:
                raise InvariantError(f"{self.package}.{name} registers no {self.kind} named {name!r}")
        return self._found[name]
