"""What every child process does first: die with its parent, ignore the terminal's signals, speak frames on pipes.

It does not know what the child computes. A child's standard input is also its lifeline: end of file means that the
parent is gone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TextIO, TypeVar

import msgspec

from engine.serve import wire

PR_SET_PDEATHSIG = 1
Message = TypeVar("Message")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (PR_SET_PDEATHSIG, Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def leave_signals_to_parent() -> None:
    """A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group; the parent drains and tells us when."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def claim_stdout() -> int:
    """A descriptor of the real standard output for frames; from now on print() goes to standard error."""
    sys.stdout.flush()
    claimed = os.dup(1)
    os.dup2(2, 1)
    return claimed


def read_exactly(descriptor: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of file."""
    parts: list[bytes] = []
    while size > 0:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, decode: Callable[[bytes], Message]) -> Message | None:
    """The next message, or None at the end of file. Raises msgspec.DecodeError for one outside the schema."""
    head = read_exactly(descriptor, 4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "little")
    if size > wire.MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {size} bytes is above {wire.MAX_FRAME_BYTES}")
    body = read_exactly(descriptor, size)
    return decode(body) if len(body) == size else None


class FrameWriter:
    """Writes whole frames to a pipe from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Block until the frame is in the pipe. Raises BrokenPipeError when nobody reads."""
        rest = memoryview(wire.frame(message))
        with self._lock:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def exit_when_closed(descriptor: int) -> None:
    """A thread that ends this process as soon as the lifeline closes."""

    def wait() -> None:
        while os.read(descriptor, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


class LogHandler(logging.StreamHandler[TextIO]):
    """Standard error; a line that cannot be written is dropped and counted, and never raises."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.dropped = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk, a closed terminal: serving goes on."""
        self.dropped += 1


def log_to_stderr(level: str) -> LogHandler:
    """Log lines of this process, in one format, on standard error. Returns the handler, which counts what is lost."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return handler
