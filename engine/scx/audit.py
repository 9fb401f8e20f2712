"""An append-only record of what a secure worker did: counts and kinds, no content, each line chained to the last.

A line's `chain` is SHA-256 over the chain before it and the line without it, so that a line changed or taken out of
the middle shows. Whoever can write the file can write it anew from any line on: keep the newest chain elsewhere.
"""

from __future__ import annotations

import hashlib
import os

import msgspec

from engine.core.clock import wall_s
from engine.core.errors import ConfigError

GENESIS = "0" * 64


class Event(msgspec.Struct, forbid_unknown_fields=True):
    """One line. number: from 0; at_s: seconds since 1970; facts: counts and kinds; chain: 64 hexadecimal digits."""

    number: int
    at_s: float
    event: str
    facts: dict[str, int | str]
    chain: str = ""


def _chain(before: str, event: Event) -> str:
    bare = msgspec.structs.replace(event, chain="")
    return hashlib.sha256(before.encode() + msgspec.json.encode(bare)).hexdigest()


def verify(path: str) -> list[Event]:
    """The events of a file. Raises ConfigError naming the first line that does not follow from the one before."""
    events: list[Event] = []
    before = GENESIS
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            try:
                event = msgspec.json.decode(line, type=Event)
            except msgspec.DecodeError:
                raise ConfigError(f"{path}: line {number + 1} is not an event") from None
            if event.number != number or event.chain != _chain(before, event):
                raise ConfigError(f"{path}: line {number + 1} does not follow from the one before; it was changed")
            before = event.chain
            events.append(event)
    return events


class Audit:
    """Appends events to a file, mode 0600; without a path, to nothing. Continues a file that verifies.

    Raises ConfigError for one that does not, or cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: int | None = None
        self._number, self._before = 0, GENESIS
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            events = verify(path)
        except OSError as error:
            raise ConfigError(f"--audit-file {path}: {error.strerror or error}") from None
        if events:
            self._number, self._before = len(events), events[-1].chain

    def note(self, event: str, **facts: int | str) -> None:
        """Append one event."""
        if self._file is None:
            return
        made = Event(self._number, wall_s(), event, facts)
        made.chain = self._before = _chain(self._before, made)
        self._number += 1
        os.write(self._file, msgspec.json.encode(made) + b"\n")
