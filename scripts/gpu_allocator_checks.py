"""Checks of the allocator on a real GPU, for scripts/gpu_allocator.py. Each raises where a promise breaks.

What launches kernels needs torch; the rest only libcuda, by hand. Knows no costs.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from vattention_ext import KvAllocator, KvGeometry
from vattention_ext.model import KvModel
from vattention_ext.values import VERBS, KvStats

MIB = 1 << 20
LLAMA = {"layers": 32, "kv_heads": 8, "head_dim": 128, "element_bytes": 2}  # 65,536 bytes a token and side
MATRIX = 4096
Found = dict[str, Any]


class Cuda:
    """libcuda by hand, with the device's primary context current on this thread."""

    def __init__(self, path: str | None, device: int) -> None:
        self.library = ctypes.CDLL(path or "libcuda.so.1")
        self("cuInit", 0)
        context, handle = ctypes.c_void_p(), ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(handle), device)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self("cuCtxSetCurrent", context)
        name, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self("cuDeviceGetName", name, 256, handle)
        self("cuDriverGetVersion", ctypes.byref(version))
        self.name, self.version = name.value.decode(), version.value

    def __call__(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with the device's word for what went wrong."""
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or str(code).encode()).decode()}")

    def write(self, address: int, value: int) -> None:
        """A 64-bit word, synchronously."""
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.byref(ctypes.c_uint64(value)), ctypes.c_size_t(8))

    def read(self, address: int) -> int:
        word = ctypes.c_uint64()
        self("cuMemcpyDtoH_v2", ctypes.byref(word), ctypes.c_uint64(address), ctypes.c_size_t(8))
        return word.value

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


class Load:
    """Work for the GPU: matrix products on torch's current stream. Without torch a step only takes time."""

    def __init__(self, torch: Any) -> None:
        self.torch, self.stream, self._before = torch, 0, None
        if torch is not None:
            self.a = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
            self.out = torch.empty_like(self.a)
            self.stream = torch.cuda.current_stream().cuda_stream
            self.products(20)
            torch.cuda.synchronize()

    def products(self, count: int) -> None:
        for _ in range(count):
            self.torch.mm(self.a, self.a, out=self.out)

    def step(self) -> None:
        """Launches about 5 ms of products (on an H200)."""
        if self.torch is not None:
            self.products(25)

    def catch_up(self) -> None:
        """Waits for the step before the one launched last."""
        if self.torch is None:
            time.sleep(0.002)
            return
        event = self.torch.cuda.Event()
        event.record()
        if self._before is not None:
            self._before.synchronize()
        self._before = event

    def timed_ms(self, work: Callable[[], object], count: int, load: Callable[[], object]) -> float:
        """GPU time of `count` launches of `load`, made before `work` runs on this thread."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            load()
        end.record()
        work()
        end.synchronize()
        return float(start.elapsed_time(end))


class Bench:
    """What all checks and measurements need."""

    def __init__(self, libcuda: str | None, device: int, torch: Any) -> None:
        self.libcuda, self.device, self.torch = libcuda, device, torch
        self.cuda = Cuda(libcuda, device)
        self.load = Load(torch)

    def open(self, driver: str = "cuda", **settings: Any) -> KvAllocator:
        """An allocator of Llama-3-8B's shape; the geometry's fields may be given beside the settings."""
        shape: dict[str, Any] = {**LLAMA, "max_tokens": 8192, "slots": 8, "page_bytes": 2 * MIB, "layout": "mega"}
        shape.update({key: settings.pop(key) for key in list(settings) if key in shape})
        return KvAllocator(KvGeometry(**shape), driver, device=self.device, libcuda=self.libcuda, **settings)

    def address(self, kv: KvAllocator, plane: int, slot: int, index: int = 0) -> int:
        return kv.regions[plane].address + slot * kv.geometry.slot_bytes + index * kv.geometry.page_bytes


def child(bench: Bench, mode: str, before: tuple[str, ...] = (), limit_s: float = 40,
          options: tuple[str, ...] = ()) -> tuple[int, str]:  # fmt: skip
    """scripts.gpu_allocator in `mode`, in a process of its own: (status, last of what it said)."""
    command = [*before, sys.executable, "-m", "scripts.gpu_allocator", "--mode", mode, "--device", str(bench.device)]
    command += [*options, *(("--libcuda", bench.libcuda) if bench.libcuda else ())]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return -1, f"not through in {limit_s:.0f} s"
    return ended.returncode, (ended.stdout + ended.stderr)[-1500:].strip()


def need(ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(what)


def acquire(kv: KvAllocator, tokens: int = 0) -> int:
    """A slot; there is always one here."""
    slot = kv.acquire(tokens)
    if not isinstance(slot, int):
        raise RuntimeError(f"no slot: {slot}")
    return slot


def comparable(stats: KvStats) -> list[Any]:
    names = ("free", "in_use", "look_ahead", "kept", "quarantined", "moving", "shared", "stolen", "read_only")
    return [getattr(stats, f"{name}_groups") for name in names] + [stats.driver_calls, stats.driver_failures]


def check_model(bench: Bench) -> Found:
    """Random calls with injected failures: the same answers, counts and driver calls as the Python model, and in every
    page the word that was written into it when it was made."""
    chance, operations, stamps = random.Random(5), 0, set[int]()
    for layout, layers in (("mega", 32), ("per_layer", 2)):
        tokens = 160 if layout == "mega" else 5120
        kv = bench.open("fault_cuda", layout=layout, layers=layers, slots=4, max_tokens=tokens, pool_groups=12)
        model = KvModel(kv.geometry, pool_groups=12)
        for _ in range(400):
            slot, other, count = chance.randrange(4), chance.randrange(4), chance.randrange(tokens + 1)
            call: tuple[Any, ...] = chance.choice([
                ("acquire", count), ("ensure", slot, count), ("ensure", slot, count), ("trim", slot, count // 2),
                ("look_ahead", [(slot, count)]), ("release", slot), ("reclaim", chance.randrange(3)),
                ("share", slot, other, 1 + count % 3), ("fail_at", chance.choice(VERBS[2:]), chance.randint(0, 4), 1),
            ])  # fmt: skip
            answers = []
            for each in (model, kv):
                try:
                    answer = getattr(each, call[0])(*call[1:])
                    answers.append(answer.wait(20) and None if call[0] == "look_ahead" else answer)
                except ValueError:
                    answers.append("ValueError")
            need(answers[0] == answers[1], f"{call}: the model says {answers[0]}, the GPU {answers[1]}")
            need(comparable(model.stats()) == comparable(kv.stats()), f"{call}: counts differ")
            kv.check()
            operations += answers[0] != "ValueError"
            for slot in range(4):
                for index in range(kv.geometry.groups_per_slot):
                    serial = model.cell_group(slot, index)
                    if serial is None or chance.random() < 0.7:
                        continue
                    plane = chance.randrange(kv.geometry.planes)
                    at, word = bench.address(kv, plane, slot, index), serial * 1000 + plane
                    if word not in stamps:
                        bench.cuda.write(at, word)
                        stamps.add(word)
                    need(bench.cuda.read(at) == word, f"{call}: a page is not where it should be")
        stamps.clear()
        kv.fail_at("any", 0)
        kv.close()
    return {"operations": operations}


def check_memory_returns(bench: Bench) -> Found:
    """What an idle allocator gives back, and what a lowered limit gives back, another process may use."""
    free = bench.cuda.free_bytes()
    kv = bench.open(pool_groups=200, floor_groups=10, release_after_s=0.2, stock_groups=8)
    slot = acquire(kv)
    need(kv.ensure(slot, 200 * 32) is None, "200 groups do not fit the GPU")
    held = free - bench.cuda.free_bytes()
    kv.fence(bench.load.stream)
    kv.release(slot)
    start = time.perf_counter()
    while kv.stats().physical_bytes > 10 * kv.geometry.group_bytes and time.perf_counter() - start < 10:
        time.sleep(0.01)
    idle_s = time.perf_counter() - start
    kept = free - bench.cuda.free_bytes()
    if bench.libcuda is None:
        status, said = child(bench, "free")
        need(status == 0 and abs(int(said) - (free - kept)) < 1 << 30, f"another process sees {said} bytes free")
    kv.set_limit(3)
    while kv.stats().over_limit_groups and time.perf_counter() - start < 10:
        time.sleep(0.01)
    need(kv.stats().physical_bytes <= 3 * kv.geometry.group_bytes, "the limit was not obeyed")
    kv.close()
    need(held >= 780 * MIB and kept <= 60 * MIB, f"held {held}, kept {kept} bytes")
    return {"held_mib": held // MIB, "kept_mib": kept // MIB, "idle_s": round(idle_s, 2)}


def check_out_of_memory(bench: Bench) -> Found:
    """More groups than the GPU has memory for: a refusal, and everything is free again after it."""
    free = bench.cuda.free_bytes()
    groups = free // (128 * MIB) + 20
    kv = bench.open(pool_groups=groups, slots=1, max_tokens=groups * 1024, page_bytes=64 * MIB)
    slot = acquire(kv)
    start = time.perf_counter()
    refusal = kv.ensure(slot, groups * 1024)
    need(refusal is not None and refusal.reason == "memory", f"not refused for memory: {refusal}")
    need(kv.stats().physical_bytes == 0, "something of it remains")
    kv.close()
    need(free - bench.cuda.free_bytes() <= 64 * MIB, "memory did not come back")
    return {"refused_groups": groups, "took_s": round(time.perf_counter() - start, 2)}


def check_read_only(bench: Bench) -> Found:
    """Whether this GPU can map a page read-only (the driver does not count on it)."""
    kv = bench.open(pool_groups=1)
    slot = acquire(kv)
    need(kv.ensure(slot, 1) is None, "no page")
    description = (ctypes.c_int * 3)(1, bench.device, 1)
    try:
        bench.cuda("cuMemSetAccess", ctypes.c_uint64(bench.address(kv, 0, slot)), ctypes.c_size_t(2 * MIB),
                   description, ctypes.c_size_t(1))  # fmt: skip
        answer = "supported"
    except RuntimeError as error:
        answer = str(error)
    kv.close()
    return {"read_only_mapping": answer}


def slot_view(bench: Bench, kv: KvAllocator, plane: int, slot: int, groups: int) -> Any:
    """The first groups of a slot as a torch tensor of bytes."""
    start = slot * kv.geometry.slot_bytes
    return bench.torch.from_dlpack(kv.regions[plane])[start : start + groups * kv.geometry.page_bytes]


def check_growth_beside_kernels(bench: Bench) -> Found:
    """Kernels read and write the mapped head of slots while the mapper grows and shrinks their tails."""
    torch = bench.torch
    kv = bench.open(pool_groups=64, slots=2)
    a, b = acquire(kv), acquire(kv)
    head = None
    for groups in range(1, 33):
        need(kv.ensure(a, groups * 32) is None and kv.ensure(b, groups * 32) is None, "no pages")
        views = [slot_view(bench, kv, plane, slot, groups) for slot in (a, b) for plane in (0, 1)]
        for view in views:
            view[-2 * MIB :].fill_(groups)
        head = sum(view.sum(dtype=torch.int64) for view in views)
        kv.fence(bench.load.stream)
        kv.look_ahead([(a, groups * 32 + 64), (b, groups * 32 + 64)])
        if groups % 8 == 0:
            kv.trim(b, groups * 32)
    need(head is not None and int(head.item()) == 4 * 2 * MIB * sum(range(1, 33)), "bytes were lost")
    kv.check()
    stats = kv.stats()
    kv.close()
    return {"look_ahead": stats.look_ahead_mapped}


def check_shared(bench: Bench) -> Found:
    """Both slots of a shared group read the same bytes; the one that stays reads them after the other left."""
    kv = bench.open(pool_groups=8)
    a, b = acquire(kv), acquire(kv)
    need(kv.ensure(a, 64) is None, "no pages")
    slot_view(bench, kv, 1, a, 2).fill_(5)
    need(kv.share(a, b, 2) is None, "not shared")
    kv.fence(bench.load.stream)
    kv.release(a)
    need(int(slot_view(bench, kv, 1, b, 2).sum(dtype=bench.torch.int64).item()) == 5 * 4 * MIB, "other bytes")
    kv.close()
    return {}


PLAIN = (check_model, check_memory_returns, check_out_of_memory, check_read_only)
LAUNCHING = (check_growth_beside_kernels, check_shared)
