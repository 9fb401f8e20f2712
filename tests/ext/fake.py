"""The tests' side of fake_cuda/fake_cuda.cpp: building it, and steering its streams, memory and failures.

One fake a process, as there is one libcuda. Knows nothing of allocators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fake_cuda" / "fake_cuda.cpp"
BUILD = HERE.parents[1] / "build" / "fake_cuda"
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700


def build() -> Path:
    """The library, compiled if its source changed; by rename, because other processes may build it, too."""
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = BUILD / f"libcuda_fake_{name}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread"]
        subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(library)
    return library


class FakeCuda:
    """The loaded fake. Streams are numbers; a kernel is a range that it may read until its stream is past it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        u64, text = ctypes.c_uint64, ctypes.c_char_p
        for name, arguments, result in (
            ("launch", [u64, u64, u64], None), ("advance", [u64, ctypes.c_long], ctypes.c_long),
            ("automatic", [ctypes.c_int], None), ("fail", [text, ctypes.c_long, ctypes.c_long, ctypes.c_int], None),
            ("fail_too", [text, ctypes.c_long, ctypes.c_long, ctypes.c_int], None),
            ("memory", [u64], None), ("stale", [ctypes.c_long], None), ("granularity", [u64], None),
            ("calls", [text], ctypes.c_long), ("used_bytes", [], u64), ("mapped_bytes", [], u64),
            ("leftovers", [], ctypes.c_long), ("violations", [], text),
        ):  # fmt: skip
            function = getattr(self.library, f"fake_{name}")
            function.argtypes, function.restype = arguments, result

    def launch(self, stream: int, address: int, nbytes: int) -> None:
        """A kernel that may read these bytes until the stream is past it."""
        self.library.fake_launch(stream, address, nbytes)

    def advance(self, stream: int, count: int = -1) -> int:
        """Runs up to `count` kernels and events of the stream (< 0: all). Returns how many there were."""
        return int(self.library.fake_advance(stream, count))

    def automatic(self, on: bool) -> None:
        """Events pass when they are recorded."""
        self.library.fake_automatic(int(on))

    def stale(self, queries: int) -> None:
        """The next `queries` questions after an event answer "not yet", whatever has happened."""
        self.library.fake_stale(queries)

    def fail(self, name: str, nth: int = 1, times: int = 1, result: int = ILLEGAL_ADDRESS) -> None:
        """Calls nth .. nth + times - 1 of cu`name` fail; nth 0: none."""
        self.library.fake_fail(name.encode(), nth, times, result)

    def fail_too(self, name: str, nth: int = 1, times: int = 1, result: int = ILLEGAL_ADDRESS) -> None:
        """A second function beside the one of fail()."""
        self.library.fake_fail_too(name.encode(), nth, times, result)

    def memory(self, nbytes: int) -> None:
        """Of the whole device."""
        self.library.fake_memory(nbytes)

    def granularity(self, nbytes: int) -> None:
        self.library.fake_granularity(nbytes)

    def calls(self, name: str) -> int:
        return int(self.library.fake_calls(name.encode()))

    @property
    def used_bytes(self) -> int:
        """Of all pages that exist."""
        return int(self.library.fake_used_bytes())

    @property
    def mapped_bytes(self) -> int:
        """That a kernel could read."""
        return int(self.library.fake_mapped_bytes())

    @property
    def leftovers(self) -> int:
        """Contexts, reservations, pages, mappings and events that exist."""
        return int(self.library.fake_leftovers())

    def violations(self) -> list[str]:
        """What nobody may do, and was done since the last call."""
        return bytes(self.library.fake_violations()).decode().splitlines()

    def reset(self) -> None:
        """As it was at first, but for what still exists."""
        self.automatic(True)
        self.fail("none", 0)
        self.fail_too("none", 0)
        self.memory(1 << 30)
        self.granularity(4096)
        self.stale(0)
        self.violations()


@functools.cache
def fake_cuda() -> FakeCuda:
    """The one fake of this process."""
    return FakeCuda(build())


@functools.cache
def has_gpu() -> bool:
    """There is a real libcuda with a GPU that this process may use."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
