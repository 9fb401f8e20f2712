"""Jobs that a word of memory calls for: each is done before the word is 0 again, whoever helps and however long nobody
called."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessera_kernels import host_jobs, native
from tessera_kernels.cores import quota

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="the C++ kernels are not built")


def called(bell: host_jobs.Bell, number: int) -> None:
    """What a device does."""
    bell.word[0] = number
    deadline = time.monotonic() + 10
    while int(bell.word[0]):
        assert time.monotonic() < deadline, "nobody answered"


def copied(to: torch.Tensor, source: torch.Tensor) -> int:
    return native.extension().copy_job(to.data_ptr(), source.data_ptr(), to.nbytes)  # type: ignore[no-any-return]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_is_answered_when_it_is_done(threads: int) -> None:
    """200 jobs one after the other; numbers of those that ran once are used again."""
    bell = host_jobs.Bell(threads)
    to, numbers = torch.zeros(1000), set()
    for i in range(200):
        source = torch.full((1000,), float(i + 1))
        number = bell.add(copied(to, source))
        called(bell, number)
        numbers.add(number)
        assert bool((to == i + 1).all())
    assert numbers == {1}
    bell.stop()


def test_it_is_found_asleep() -> None:
    """After a pause its thread only looks now and again, and a call is answered all the same."""
    bell = host_jobs.Bell(2)
    to = torch.zeros(4)
    for value in (1.0, 2.0):
        time.sleep(0.06)
        source = torch.full((4,), value)
        called(bell, bell.add(copied(to, source)))
        assert to.tolist() == [value] * 4
    bell.stop()


@pytest.mark.parametrize("threads", [1, 4])
def test_rows_are_mapped_as_without_it(threads: int) -> None:
    """A job that is kept runs again on other rows, and gives what it gives in the thread that launches."""
    heads, groups, dim, count = 4, 2, 64, 37
    draw = torch.Generator().manual_seed(3)
    angles = torch.rand(50, 2, dim // 2, generator=draw)
    maps = tuple(torch.rand(5, groups, dim, generator=draw).argsort(dim=-1).to(torch.int16) for _ in range(3))
    came = torch.zeros(count, (heads + 2 * groups) * dim)
    goes = torch.zeros_like(came)
    positions = torch.arange(count, dtype=torch.int32)
    slots = torch.arange(count, dtype=torch.int32) % 5
    crossing = host_jobs.Crossing(came, goes, positions, slots, torch.arange(count, dtype=torch.int32))
    cpu, bell = torch.device("cpu"), host_jobs.Bell(threads)
    kept = native.OPS[torch.float32].encode_job(
        came.data_ptr(), goes.data_ptr(), angles.data_ptr(), positions.data_ptr(), slots.data_ptr(),
        crossing.own.data_ptr(), *(each.data_ptr() for each in maps), False, 5, maps[0].stride(0), count, heads, groups,
        dim, 50, False, False)  # fmt: skip
    number = bell.add(kept)
    for _ in range(3):
        came.copy_(torch.randn(came.shape, generator=draw))
        host_jobs.encode(crossing, angles, maps, heads, cpu)  # type: ignore[arg-type]
        want = goes.clone()
        goes.zero_()
        called(bell, number)
        assert bool(want.any()) and torch.equal(goes, want)
    bell.stop()


def test_it_ends_with_its_owner() -> None:
    """Dropped without a word, its threads are gone."""
    import threading

    before = len(list(Path("/proc/self/task").iterdir()))
    bell = host_jobs.Bell(3)
    assert len(list(Path("/proc/self/task").iterdir())) == before + 3
    del bell
    gc.collect()
    deadline = time.monotonic() + 10
    while len(list(Path("/proc/self/task").iterdir())) > before:
        assert time.monotonic() < deadline, threading.active_count()


def test_what_a_stream_still_calls_for_is_answered_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends, or drops a bell, in the middle of a step: kernels that wait are not left alone."""
    make = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **more: make(*size, **more))
    bell = host_jobs.Bell(1)
    to, source = make(4), torch.ones(4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called(bell, bell.add(copied(to, source))))
    bell.stop()
    assert to.tolist() == [1.0] * 4


@pytest.mark.parametrize(("usable", "words"), [(True, ""), (False, "cannot be used by this thread: CUDA error 5")])
def test_a_thread_new_to_the_device_takes_its_context(
    usable: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's refusal is answered once, with the primary context of the device that is meant."""
    calls: list[tuple[str, object]] = []

    def say(name: str, status: int) -> Callable[..., int]:
        def called(*arguments: Any) -> int:
            calls.append((name, arguments[-1]))
            return status

        return called

    def launch(stream: int, function: int, job: int) -> int:
        first = not calls
        calls.append(("launch", job))
        return host_jobs.INVALID_CONTEXT if first else 0

    driver = SimpleNamespace(
        cuLaunchHostFunc=launch, cuDeviceGet=say("device", 0), cuCtxSetCurrent=say("set", 0),
        cuDevicePrimaryCtxRetain=say("retain", 0 if usable else 5),
    )  # fmt: skip
    monkeypatch.setattr(host_jobs, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    with pytest.raises(RuntimeError, match=words) if words else contextlib.nullcontext():
        host_jobs.launch(3, torch.device("cuda", 1))
    names = ["launch", "device", "retain", "set", "launch"] if usable else ["launch", "device", "retain"]
    assert [name for name, _ in calls] == names and calls[1] == ("device", 1)


def test_threads_must_make_sense() -> None:
    """Not a thousand and more."""
    with pytest.raises(ValueError, match="outside 1..1024"):
        host_jobs.Bell(2000)


@pytest.mark.parametrize(("cores", "threads", "pays"), [(1, 1, False), (2, 1, False), (7, 3, False), (8, 4, True),
                                                        (16, 8, True), (64, 8, True)])  # fmt: skip
def test_a_bell_takes_half_of_the_cores_and_needs_eight(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, pays: bool
) -> None:
    """With fewer, threads that look for work without pause would be in the way of those that have some."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr("tessera_kernels.cores.quota", lambda: math.inf)
    assert host_jobs.bell_threads() == threads and host_jobs.bell_pays() is pays


@pytest.mark.parametrize(("groups", "files", "cores", "threads"), [
    ("0::/", {"cpu.max": "max 100000"}, math.inf, 8),
    ("0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 2.5, 1),
    ("3:cpu,cpuacct:/docker/x\n2:cpuset:/\n0::/", {"cpu,cpuacct/cpu.cfs_quota_us": "400000",
                                                  "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4.0, 2),
    ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf, 8),
])  # fmt: skip
def test_a_quota_of_time_counts_as_cores_do(
    groups: str, files: dict[str, str], cores: float, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By control groups of either version, a process's own or those above; and a bell goes by it."""
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = quota(tmp_path / "groups", tmp_path)
    assert found == cores and quota(tmp_path / "absent", tmp_path) == math.inf
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("tessera_kernels.cores.quota", lambda: found)
    assert host_jobs.bell_threads() == threads and host_jobs.bell_pays() is (threads == 8)
