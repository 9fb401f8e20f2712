"""A kernel that reads a range of GPU memory over and over until it is told to stop, launched by hand through libcuda.

While its gate is shut it is in flight, whatever the machine's speed: it says so itself, in memory that both sides see.
Needs neither torch nor nvcc. Knows nothing of allocators.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.gpu_allocator_checks import Cuda

THREADS = 1024  # one block: it takes one SM and leaves the others alone
STEP_BYTES = 128  # one word of every cache line is read
LIMIT_NS = 5_000_000_000  # after which the kernel ends by itself, gate or not
NON_BLOCKING, PORTABLE_AND_MAPPED = 1, 3
GATE, STARTED, PASSES, DONE = range(4)  # words of `host`

# reader(host, wrong, data, lines, want, limit): each pass compares the first word of all lines with `want` and adds
# what differs to *wrong; one more pass follows after the gate was found open.
PTX = f"""\
.version 7.0
.target sm_70
.address_size 64
.visible .entry reader(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3, .param .u64 p4, .param .u64 p5)
{{
  .reg .pred %first, %more, %same, %none, %late, %stop;
  .reg .b32 %me;
  .reg .b64 %host, %wrong, %data, %lines, %want, %limit, %line, %at, %word, %bad, %one, %pass, %open, %start, %now;
  .shared .align 8 .b64 opened;
  ld.param.u64 %host, [p0];
  ld.param.u64 %wrong, [p1];
  ld.param.u64 %data, [p2];
  ld.param.u64 %lines, [p3];
  ld.param.u64 %want, [p4];
  ld.param.u64 %limit, [p5];
  mov.u32 %me, %tid.x;
  setp.eq.u32 %first, %me, 0;
  mov.u64 %one, 1;
  mov.u64 %pass, 0;
  mov.u64 %open, 0;
  mov.u64 %start, %globaltimer;
  @%first st.volatile.global.u64 [%host+8], %one;
again:
  cvt.u64.u32 %line, %me;
  mov.u64 %bad, 0;
lines:
  setp.lt.u64 %more, %line, %lines;
  @!%more bra passed;
  mad.lo.u64 %at, %line, {STEP_BYTES}, %data;
  ld.volatile.global.u64 %word, [%at];
  setp.eq.u64 %same, %word, %want;
  @!%same add.u64 %bad, %bad, 1;
  add.u64 %line, %line, {THREADS};
  bra lines;
passed:
  setp.eq.u64 %none, %bad, 0;
  @!%none red.global.add.u64 [%wrong], %bad;
  bar.sync 0;
  setp.ne.u64 %stop, %open, 0;
  @%stop bra over;
  @!%first bra told;
  add.u64 %pass, %pass, 1;
  st.volatile.global.u64 [%host+16], %pass;
  membar.sys;
  ld.volatile.global.u64 %open, [%host];
  mov.u64 %now, %globaltimer;
  sub.u64 %now, %now, %start;
  setp.gt.u64 %late, %now, %limit;
  @%late mov.u64 %open, 1;
  st.volatile.shared.u64 [opened], %open;
told:
  bar.sync 0;
  ld.volatile.shared.u64 %open, [opened];
  bra again;
over:
  @%first st.volatile.global.u64 [%host+24], %one;
  ret;
}}
"""


def assembled() -> bytes:
    """The kernel for a driver that cannot compile PTX itself. Raises RuntimeError where no ptxas is at hand."""
    places = [shutil.which("ptxas"), *map(str, Path("/usr/local").glob("cuda*/bin/ptxas"))]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"))
    except ImportError:
        pass
    tool = next((place for place in places if place and Path(place).exists()), None)
    if tool is None:
        raise RuntimeError("the driver cannot compile PTX, and no ptxas was found")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "reader.ptx"), Path(folder, "reader.cubin")
        source.write_text(PTX, encoding="ascii")
        subprocess.run([tool, "-arch=sm_90", str(source), "-o", str(binary)], check=True, capture_output=True)
        return binary.read_bytes()


class Reader:
    """One such kernel and its stream."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        module, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            cuda("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(PTX.encode()))
        except RuntimeError:
            cuda("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(assembled()))
        cuda("cuModuleGetFunction", ctypes.byref(self._kernel), module, b"reader")
        host, self._wrong, stream = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
        cuda("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(64), PORTABLE_AND_MAPPED)
        cuda("cuMemAlloc_v2", ctypes.byref(self._wrong), ctypes.c_size_t(64))
        cuda("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self._host_address = host.value or 0
        self.host = (ctypes.c_uint64 * 8).from_address(self._host_address)
        self._stream, self.stream = stream, stream.value or 0

    def launch(self, address: int, nbytes: int, want: int) -> None:
        """Starts reading; returns once the first pass is through, the gate shut. Raises RuntimeError if it is not."""
        ctypes.memset(self._host_address, 0, 64)
        self.cuda.write(self._wrong.value, 0)
        values = (self._host_address, self._wrong.value, address, nbytes // STEP_BYTES, want, LIMIT_NS)
        words = [ctypes.c_uint64(value) for value in values]
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        self.cuda("cuLaunchKernel", self._kernel, 1, 1, 1, THREADS, 1, 1, 0, self._stream, pointers, None)
        deadline = time.perf_counter() + 3
        while self.host[PASSES] == 0:
            if time.perf_counter() > deadline:
                raise RuntimeError("the reading kernel did not start")
            time.sleep(0.0005)

    @property
    def in_flight(self) -> bool:
        """It has begun and not ended, by its own word."""
        return bool(self.host[STARTED]) and not self.host[DONE]

    @property
    def passes(self) -> int:
        """So many times it has read the whole range."""
        return int(self.host[PASSES])

    def open(self) -> None:
        """Lets it end after one more pass."""
        self.host[GATE] = 1

    def end(self) -> int:
        """Waits for it. Returns how many words were not what it wanted. Raises RuntimeError with the device's error."""
        self.cuda("cuStreamSynchronize", self._stream)
        return self.cuda.read(self._wrong.value)

    def close(self) -> None:
        """Gives its memory back."""
        self.cuda("cuStreamDestroy_v2", self._stream)
        self.cuda("cuMemFree_v2", self._wrong)
        self.cuda("cuMemFreeHost", ctypes.c_void_p(self._host_address))
