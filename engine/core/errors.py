"""The exceptions of the engine, in one tree, and the one refusal that is not an exception.

It deliberately knows nothing of HTTP: the server maps these to status codes.

    TesseraError
    ├── ConfigError        the user can fix it: a flag, a file, a model folder   -> exit status 2, one line
    │   └── LoadError      a checkpoint, tokenizer or artefact that cannot be used
    ├── RequestError       one request is wrong; nothing else is affected        -> HTTP 400
    └── InvariantError     our bug: stop this step, keep the server, tell it loudly

Every message says the value, the allowed range and the fix.
"""

from __future__ import annotations

from dataclasses import dataclass


class TesseraError(Exception):
    """Base of everything the engine raises on purpose."""


class ConfigError(TesseraError):
    """A setting that cannot be honoured. The message names value, allowed range and fix."""


class LoadError(ConfigError):
    """A model, tokenizer or artefact that cannot be loaded. The message names the file and what is wrong in it."""


def named(error: Exception) -> str:
    """An error as a line for people: a refusal that has a name of its own (WrongRows, BaseMismatch) begins with it."""
    own = isinstance(error, ConfigError) and type(error) not in (ConfigError, LoadError)
    return f"{type(error).__name__}: {error}" if own else str(error)


class RequestError(TesseraError):
    """One request is wrong: `param` is the field (as the client spells it), the message has value and limit."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvariantError(TesseraError):
    """Something we promised ourselves does not hold."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something was not done now; falsy, so `if not draft.admit(seq)` reads well. Retry later.

    reason: "pages" | "slots" | "budget" | "limit" | "arrival"; need and free are in the unit of the reason.
    """

    reason: str
    need: int = 0
    free: int = 0

    def __bool__(self) -> bool:
        return False
