"""The CUDA driver and its fences on the fake libcuda: what a kernel in flight may read stays where it is.

The fake refuses and remembers every unmapping, and every change of access, under a kernel that its stream has not got
past; each test ends by asking for what it remembers.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ext.fake import FakeCuda, fake_cuda
from tests.ext.support import assert_clean, geometry, groups, make
from vattention_ext import DriverError, KvAllocator, KvGeometry

Open = Callable[..., Any]
STREAM = 7
LIMIT_S = 20


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """The fake with streams that stand still until told."""
    one = fake_cuda()
    one.reset()
    one.automatic(False)
    yield one
    one.reset()


@pytest.fixture
def open_kv(fake: FakeCuda) -> Iterator[Open]:
    """Opens allocators on the fake; closes them and asks what was done to it."""
    opened = []

    def opener(layout: str = "mega", slots: int = 4, **settings: Any) -> Any:
        opened.append(make("cuda", geometry(layout, slots), **settings))
        return opened[-1]

    yield opener
    while opened:
        kv = opened.pop()
        kv.check()
        kv.close()
        kv.check()
        del kv
    assert_clean("cuda")


def launch(kv: Any, slot: int, stream: int = STREAM) -> None:
    """A kernel that reads all tokens of the slot, in every plane."""
    g = kv.geometry
    for region in kv.regions:
        size = g.groups_for(kv.tokens(slot)) * g.page_bytes
        fake_cuda().launch(stream, region.address + slot * g.slot_bytes, size)


def until(met: Callable[[], bool]) -> None:
    """Waits for another thread."""
    deadline = time.perf_counter() + LIMIT_S
    while not met():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.001)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Starts the call; its result is appended to the list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def run_step(kv: Any, *slots: int, stream: int = STREAM) -> None:
    """Launches a kernel over the slots and fences it."""
    for slot in slots:
        launch(kv, slot, stream)
    kv.fence(stream)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_a_page_under_a_kernel_in_flight_is_not_given_away(fake: FakeCuda, open_kv: Open, layout: str) -> None:
    """The forced race: a growth that needs the pages of a slot released under a running kernel waits, without holding
    others up, until that kernel is through; not a driver call happens before."""
    kv = open_kv(layout, pool_groups=5)
    old, new, idle = (kv.acquire(0) for _ in range(3))
    assert kv.ensure(old, 50) is None
    run_step(kv, old)
    kv.release(old)
    before = kv.stats()
    thread, results = in_thread(lambda: kv.ensure(new, 30))
    until(lambda: fake.calls("cuEventSynchronize") > 0)
    time.sleep(0.05)
    stats = kv.stats()
    assert not results and stats.driver_calls == before.driver_calls and stats.kept_groups == 5
    assert kv.acquire(50) == old and kv.tokens(idle) == 0, "the one who waits does not hold the mutex"
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    assert results == [None]
    stats = kv.stats()
    assert groups(stats) == {"in_use": 3, "look_ahead": 2} and stats.stolen_groups == 3
    assert stats.fence_wait_us > 40_000
    assert fake.violations() == []


def test_growth_and_reuse_wait_for_nobody(fake: FakeCuda, open_kv: Open) -> None:
    """With a kernel in flight: the tail grows, and a released slot's next request gets its pages, in this thread."""
    kv = open_kv(pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 20)
    kv.ensure(b, 20)
    run_step(kv, a, b)
    assert kv.ensure_many([(a, 30), (b, 40)]) == []
    assert kv.look_ahead([(a, 50)]).wait(LIMIT_S) and kv.stats().look_ahead_mapped == 2
    kv.release(b)
    calls = kv.stats().driver_calls
    assert kv.acquire(40) == b and kv.ensure(b, 40) is None
    assert kv.stats().driver_calls == calls and kv.stats().pending_fences == 1
    assert kv.stats().fence_wait_us == 0


def test_shrinking_under_a_kernel_is_left_to_the_mapper(fake: FakeCuda, open_kv: Open) -> None:
    """trim() returns at once; the pages leave when the kernel is through, and count as moving until then."""
    kv = open_kv(pool_groups=10)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    run_step(kv, slot)
    kv.trim(slot, 10)
    assert groups(kv.stats()) == {"free": 5, "in_use": 1, "moving": 4} and kv.stats().leaving_positions == 4
    time.sleep(0.02)
    assert fake.mapped_bytes == 5 * kv.geometry.group_bytes
    kv.check()
    fake.advance(STREAM)
    until(lambda: groups(kv.stats()) == {"free": 9, "in_use": 1})
    assert fake.mapped_bytes == kv.geometry.group_bytes and fake.violations() == []


def test_growing_back_over_pages_that_are_leaving(fake: FakeCuda, open_kv: Open) -> None:
    """The place is taken until the fence passes: the growth waits for it, the look-ahead gives up."""
    kv = open_kv(pool_groups=10)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    run_step(kv, slot)
    kv.trim(slot, 10)
    assert kv.look_ahead([(slot, 50)]).wait(LIMIT_S)
    assert kv.stats().look_ahead_given_up == 1
    thread, results = in_thread(lambda: kv.ensure(slot, 50))
    time.sleep(0.03)
    assert not results
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    assert results == [None] and groups(kv.stats()) == {"free": 5, "in_use": 5}


def test_look_ahead_that_was_in_use_is_guarded(fake: FakeCuda, open_kv: Open) -> None:
    """Pages that set_tokens() turned into look-ahead may still be read: nobody takes them before the fence."""
    kv = open_kv(pool_groups=5)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 50)
    run_step(kv, a)
    kv.set_tokens(a, 10)
    thread, results = in_thread(lambda: kv.ensure(b, 40))
    time.sleep(0.03)
    assert not results and fake.violations() == []
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    assert results == [None] and groups(kv.stats()) == {"in_use": 5}


@pytest.mark.parametrize("queries", range(1, 13))
def test_a_fence_may_pass_between_any_two_looks(fake: FakeCuda, open_kv: Open, queries: int) -> None:
    """Wherever in a growth the device's answer turns, pages leaving are gone first, and what is released is found."""
    kv = open_kv(pool_groups=5)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 50)
    run_step(kv, a)
    kv.trim(a, 10)
    kv.release(b)
    fake.advance(STREAM)
    fake.stale(queries)
    assert kv.ensure(a, 50) is None
    fake.stale(0)
    run_step(kv, a)
    kv.release(a)
    b = kv.acquire(0)
    assert b != a
    fake.advance(STREAM)
    fake.stale(queries)
    assert kv.ensure(b, 50) is None
    assert fake.violations() == []


@pytest.mark.parametrize("first", ["owner", "sharer"])
def test_shared_pages_leave_a_slot_after_its_kernels(fake: FakeCuda, open_kv: Open, first: str) -> None:
    """Releasing one slot of a shared prefix while a kernel reads it through that slot: unmapped there only later, and
    the other slot keeps reading through its own addresses."""
    kv = open_kv(pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 35)
    assert kv.share(a, b, 3) is None
    run_step(kv, a, b)
    gone, stays = (a, b) if first == "owner" else (b, a)
    kv.release(gone)
    assert kv.stats().leaving_positions == 3
    assert kv.acquire(0) != gone, "a slot with pages leaving is not the first choice"
    launch(kv, stays)
    fake.advance(STREAM, 2 * kv.geometry.planes + 1)
    until(lambda: kv.stats().leaving_positions == 0)
    assert kv.stats().shared_groups == 0 and kv.tokens(stays) >= 32
    kv.check()
    assert fake.violations() == []


def test_a_slot_with_pages_leaving_is_used_if_it_is_the_last(fake: FakeCuda, open_kv: Open) -> None:
    """A free slot is never refused; growing there waits for the fence."""
    kv = open_kv(slots=2, pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 35)
    kv.share(a, b, 3)
    run_step(kv, a, b)
    kv.release(b)
    assert kv.acquire(0) == b
    thread, results = in_thread(lambda: kv.ensure(b, 20))
    time.sleep(0.02)
    assert not results
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    assert results == [None] and kv.tokens(b) == 20


def test_sharing_into_pages_still_read(fake: FakeCuda, open_kv: Open) -> None:
    """share() replaces what the target keeps from an earlier request only when nobody reads that any more."""
    kv = open_kv(pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 35)
    kv.ensure(b, 20)
    run_step(kv, a, b)
    kv.release(b)
    assert kv.acquire(20) == b
    thread, results = in_thread(lambda: kv.share(a, b, 3))
    time.sleep(0.02)
    assert not results
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    assert results == [None] and kv.stats().shared_groups == 3


def test_the_mapper_takes_only_what_nobody_reads(fake: FakeCuda, open_kv: Open) -> None:
    """Look-ahead without a free page: pages of an older release are taken, those of the running step are not."""
    kv = open_kv(pool_groups=6)
    old, recent, hungry = (kv.acquire(0) for _ in range(3))
    kv.ensure(old, 20)
    kv.ensure(recent, 40)
    run_step(kv, old)
    kv.release(old)
    fake.advance(STREAM)
    run_step(kv, recent)
    kv.release(recent)
    assert kv.look_ahead([(hungry, 50)]).wait(LIMIT_S)
    stats = kv.stats()
    assert (stats.look_ahead_mapped, stats.look_ahead_given_up) == (2, 1)
    assert groups(stats) == {"look_ahead": 2, "kept": 4}


def test_expiry_and_limit_wait_for_fences(fake: FakeCuda, open_kv: Open) -> None:
    """An idle engine's pages, and those beyond a lowered limit, go back once the last kernel is through, not before."""
    for settings in ({"release_after_s": 0.01}, {}):
        kv = open_kv(pool_groups=8, floor_groups=1, **settings)
        slot = kv.acquire(0)
        kv.ensure(slot, 50)
        free_before, total = kv.device_memory()
        run_step(kv, slot)
        kv.release(slot)
        if not settings:
            kv.set_limit(1)
        time.sleep(0.05)
        assert kv.stats().kept_groups == 5
        fake.advance(STREAM)
        until(lambda kv=kv: kv.stats().kept_groups == 1)  # type: ignore[misc]
        until(lambda kv=kv: kv.stats().moving_groups == 0)  # type: ignore[misc]
        assert kv.device_memory() == (free_before + 4 * kv.geometry.group_bytes, total), "another process sees it"


def test_reclaim_leaves_what_may_be_read(fake: FakeCuda, open_kv: Open) -> None:
    """reclaim() never waits: it gives back what it may."""
    kv = open_kv(pool_groups=8)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    run_step(kv, slot)
    kv.release(slot)
    assert kv.reclaim(0) == 0 and kv.stats().kept_groups == 5
    fake.advance(STREAM)
    assert kv.reclaim(0) == 5


def test_fences_pass_in_order_over_all_streams(fake: FakeCuda, open_kv: Open) -> None:
    """A later fence on a quick stream does not cover an earlier one on a slow stream."""
    kv = open_kv(pool_groups=5)
    slow, quick = kv.acquire(0), kv.acquire(0)
    kv.ensure(slow, 20)
    kv.ensure(quick, 20)
    run_step(kv, slow, stream=1)
    run_step(kv, quick, stream=2)
    kv.release(slow)
    kv.release(quick)
    fake.advance(2)
    assert kv.reclaim(0) == 0
    fake.advance(1)
    assert kv.reclaim(0) == 4


def test_stalls_are_counted_by_step(fake: FakeCuda, open_kv: Open) -> None:
    """A step that found its pages mapped stalls for 0; one that waited for a kernel shows how long."""
    kv = open_kv(pool_groups=5)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 45)
    kv.fence(STREAM)
    for tokens in range(45, 51):
        assert kv.ensure_many([(a, tokens)]) == []
        kv.fence(STREAM)
    run_step(kv, a)
    kv.release(a)
    thread, _ = in_thread(lambda: kv.ensure(b, 50))
    time.sleep(0.05)
    fake.advance(STREAM)
    thread.join(LIMIT_S)
    kv.fence(STREAM)
    stalls = kv.stalls_us()
    assert len(stalls) == kv.stats().steps == 9
    assert stalls[0] > 0 and stalls[1:8] == [0.0] * 7 and 30_000 < stalls[8] < 10_000_000


def test_the_stock_is_made_ahead_and_given_back(fake: FakeCuda, open_kv: Open) -> None:
    """After a growth the mapper creates groups ahead; they are free in the books, the next growth creates nothing, and
    an idle allocator gives them back."""
    kv = open_kv(pool_groups=8, stock_groups=3, release_after_s=1.0)
    slot = kv.acquire(0)
    assert kv.stats().stocked_groups == 0, "nothing before it is used"
    kv.ensure(slot, 10)
    until(lambda: kv.stats().stocked_groups == 3)
    stats = kv.stats()
    assert groups(stats) == {"free": 7, "in_use": 1} and stats.physical_bytes == 4 * kv.geometry.group_bytes
    until(lambda: kv.stats().stocked_groups == 0)
    assert fake.used_bytes == kv.geometry.group_bytes
    kv.ensure(slot, 20)
    until(lambda: kv.stats().stocked_groups == 3)
    fake.fail("cuMemCreate", 1, -1, 2)  # for ever: what comes now can only come from the stock
    assert kv.ensure(slot, 50) is None, "three from the stock"
    fake.fail("none", 0)
    assert kv.stats().in_use_groups == 5
    kv.set_limit(5)
    until(lambda: kv.stats().physical_bytes == 5 * kv.geometry.group_bytes)


def test_out_of_memory_is_an_ordinary_refusal(fake: FakeCuda, open_kv: Open) -> None:
    """Another process took the memory: refused with reason and words, nothing remains, and it works again later."""
    kv = open_kv(pool_groups=100)
    fake.memory(fake.used_bytes + 3 * kv.geometry.group_bytes)
    slot = kv.acquire(0)
    refusal = kv.ensure(slot, 50)
    assert refusal is not None and (refusal.reason, refusal.requested_groups) == ("memory", 5)
    assert groups(kv.stats()) == {"free": 100} and fake.used_bytes == 0
    assert kv.stats().last_error == "create: out of GPU memory"
    fake.memory(1 << 30)
    assert kv.ensure(slot, 50) is None


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemCreate", "cuMemUnmap", "cuMemRelease"])
def test_any_error_of_the_driver_is_a_value(fake: FakeCuda, open_kv: Open, call: str) -> None:
    """A failing call ends in a refusal or in quarantine with the device's word for it, and heals."""
    kv = open_kv("per_layer", pool_groups=10)
    slot = kv.acquire(0)
    fake.fail(call, 2)
    refusal = kv.ensure(slot, 50)
    if refusal is None:
        kv.trim(slot, 0)
        assert kv.stats().quarantined_groups == 1
    else:
        assert refusal.reason == "driver"
    assert kv.stats().last_error.endswith("CUDA_ERROR_ILLEGAL_ADDRESS")
    kv.check()
    kv.reclaim(0)
    assert kv.ensure(slot, 50) is None


def test_a_fence_that_cannot_be_recorded(fake: FakeCuda, open_kv: Open) -> None:
    """Without an event the stream itself is waited for; where that fails, too, the allocator says that it is blind."""
    kv = open_kv(pool_groups=5)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    launch(kv, slot)
    fake.fail("cuEventRecord")
    kv.fence(STREAM)
    assert fake.advance(STREAM) == 0, "the stream was waited for"
    fake.fail_too("cuStreamSynchronize", 1, -1)
    fake.fail("cuEventRecord", 1, -1)
    with pytest.raises(DriverError, match="stream 7: CUDA_ERROR_ILLEGAL_ADDRESS"):
        kv.fence(STREAM)
    kv.close()
    assert kv.closed


def test_closing_waits_for_the_gpu(fake: FakeCuda, open_kv: Open) -> None:
    """close() under running kernels lets them end first."""
    kv = open_kv(pool_groups=5)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    run_step(kv, slot)
    launch(kv, slot)
    kv.close()
    assert fake.violations() == []


def test_the_callers_context_stays_current(fake: FakeCuda, open_kv: Open) -> None:
    """A thread that works on another device finds its own context current after every call."""
    kv = open_kv(pool_groups=5)
    other, now = ctypes.c_void_p(0x1234), ctypes.c_void_p()
    fake.library.cuCtxPushCurrent_v2(other)
    kv.ensure(kv.acquire(0), 50)
    kv.fence(0)
    fake.library.cuCtxGetCurrent(ctypes.byref(now))
    fake.library.cuCtxPopCurrent_v2(ctypes.byref(other))
    assert now.value == 0x1234


def test_regions_are_the_gpus(fake: FakeCuda, open_kv: Open) -> None:
    """DLPack says CUDA and which device."""
    kv = open_kv(pool_groups=5, device=1)
    assert [region.__dlpack_device__() for region in kv.regions] == [(2, 1)] * 2
    assert "dltensor" in repr(kv.regions[0].__dlpack__())


@pytest.fixture
def bench(fake: FakeCuda) -> Iterator[Any]:
    """What scripts/gpu_allocator.py works with, on the fake."""
    from scripts.gpu_allocator_checks import Bench

    fake.automatic(True)
    yield Bench(str(fake.path), 0, None)
    fake.library.cuCtxSetCurrent(None)
    fake.library.cuDevicePrimaryCtxRelease_v2(0)


def test_the_gpu_script_passes_on_the_fake(fake: FakeCuda, bench: Any) -> None:
    """What scripts/gpu_allocator.py checks on a real GPU without torch: the model's answers with 2 MiB pages."""
    from scripts.gpu_allocator_checks import check_model

    assert check_model(bench)["operations"] > 200 and fake.violations() == []


def test_the_gpu_script_writes_what_the_sanitizer_said(
    fake: FakeCuda, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file names workload, command and commit beside it."""
    from scripts import gpu_allocator

    file = tmp_path / "new" / "sanitize.json"
    argv = ["--sanitize", "--libcuda", str(fake.path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["gpu_allocator", *argv])
    monkeypatch.setattr(gpu_allocator, "Bench", lambda *settings: bench)
    monkeypatch.setattr(gpu_allocator, "sanitizer", lambda: None)
    monkeypatch.setenv("TESSERA_COMMIT", "0123abc")
    assert gpu_allocator.main() == 0
    found = json.loads(file.read_text())
    assert found["sanitizer"] == {"ran": False, "why": "compute-sanitizer is not installed"}
    assert found["workload"].startswith("allocator: ") and found["commit"] == "0123abc"
    assert found["command"] == " ".join(["python -m scripts.gpu_allocator", *argv])


def test_the_forced_race_passes_on_the_fake(fake: FakeCuda, bench: Any) -> None:
    """Every way of taking pages away while the reading kernel is in flight waits for its fence."""
    from scripts.gpu_race import WAYS, check_race

    found = check_race(bench)
    assert found["ways"] == len(WAYS) == 5 and fake.violations() == []


@pytest.mark.parametrize("way", ["steal", "look_ahead", "grow_back", "expire", "lower_limit"])
def test_the_forced_race_is_one(fake: FakeCuda, bench: Any, way: str) -> None:
    """Without the fence each way unmaps what the kernel reads."""
    from scripts.gpu_race import control

    with pytest.raises(RuntimeError):  # the fake refuses the unmapping: the pages cannot come
        control(bench, way)
    assert set(fake.violations()) == {"unmap of what a kernel in flight may read"}


def test_opening_says_what_is_missing(fake: FakeCuda) -> None:
    """No library, one that is not libcuda, no such GPU, a page that the GPU cannot map: named, with the way out."""
    shape = geometry()
    with pytest.raises(DriverError, match="cannot open /nowhere/libcuda.so.*driver='memfd'"):
        KvAllocator(shape, driver="cuda", libcuda="/nowhere/libcuda.so", pool_groups=4)
    with pytest.raises(DriverError, match="has no cuInit"):
        KvAllocator(shape, driver="cuda", libcuda="libc.so.6", pool_groups=4)
    with pytest.raises(ValueError, match="device=2 is not one of the 2 GPUs"):
        make("cuda", shape, pool_groups=4, device=2)
    fake.granularity(1 << 16)
    with pytest.raises(ValueError, match="use 65536"):
        make("cuda", shape, pool_groups=4)
    fake.granularity(4096)
    fake.fail("cuMemAddressReserve", 2, 1, 2)
    with pytest.raises(DriverError, match="addresses: out of GPU memory"):
        make("cuda", KvGeometry(2, 1, 8, 2, 64, 4, 4096), pool_groups=4)
    assert_clean("cuda")
