"""The slot store: what a finished request leaves in memory, and who may read it."""

from __future__ import annotations

import time

import pytest
import torch

from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.request import SamplingParams
from engine.kv.slots import AHEAD_TOKENS, SlotStore
from vattention_ext import KvAllocator, KvGeometry

TOKENS = 200


def step(number: int, admit: int | None = None, release: int | None = None) -> StepPlan:
    """A plan that admits one sequence of TOKENS tokens, or releases one."""
    if admit is None:
        return StepPlan(number, releases=(release,) if release is not None else ())
    known = Admission(admit, 0, tuple(range(TOKENS)), 0, SamplingParams())
    return StepPlan(number, (Chunk(admit, 0, 0, TOKENS, True),), (known,), () if release is None else (release,))


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
@pytest.mark.parametrize("clear", [True, False])
def test_the_next_owner_of_a_page_reads_zeros_when_clearing(layout: str, clear: bool) -> None:
    """With clear, nothing of a finished request can be read through any slot later; without, pages are kept as is."""
    geometry = KvGeometry(
        layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=256, slots=2, page_bytes=4096, layout=layout
    )
    allocator = KvAllocator(geometry, pool_groups=geometry.groups_for(TOKENS))
    store = SlotStore(geometry, allocator, torch.float32, clear=clear)
    assert not store.apply(step(0, admit=1))
    for layer in range(2):
        for view in store.layer_views(layer):
            view[store.slot_of(1), :TOKENS] = 7.0
    assert not store.apply(step(1, release=1))
    assert not store.apply(step(2, admit=2))
    left = sum(float(view[store.slot_of(2), :TOKENS].abs().sum()) for i in range(2) for view in store.layer_views(i))
    assert (left == 0.0) is clear
    store.close()


def test_refused_growth_gives_the_slot_back() -> None:
    """A sequence whose memory is refused holds nothing afterwards, and the rest of the step is mapped."""
    geometry = KvGeometry(layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=256, slots=3, page_bytes=4096)
    allocator = KvAllocator(geometry, pool_groups=geometry.groups_for(TOKENS) + 1)
    store = SlotStore(geometry, allocator, torch.float32)
    one, two = step(0, admit=1), step(0, admit=2)
    both = StepPlan(0, one.chunks + two.chunks, one.admissions + two.admissions)
    assert store.apply(both) == {2}
    assert allocator.mapped_tokens(store.slot_of(1)) >= TOKENS
    with pytest.raises(KeyError):
        store.slot_of(2)
    assert store.stats()["kv_slots_active"] == 1
    store.close()


@pytest.mark.parametrize(
    ("chunk", "reach"),
    [(Chunk(1, 0, 0, 60, False), 120), (Chunk(1, 0, 0, 150, False), TOKENS), (Chunk(1, 0, 0, TOKENS, True), TOKENS)],
)
def test_the_mapper_looks_as_far_as_the_schedule_is_known(chunk: Chunk, reach: int) -> None:
    """A prompt's next chunk, never beyond the prompt, and a few decodes; those are mapped when their steps come."""
    geometry = KvGeometry(layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=400, slots=2, page_bytes=4096)
    allocator = KvAllocator(geometry, pool_groups=geometry.groups_per_slot)
    store = SlotStore(geometry, allocator, torch.float32)
    admission = Admission(1, 0, tuple(range(TOKENS)), 0, SamplingParams())
    plan = StepPlan(0, (chunk,), (admission,))
    assert not store.apply(plan)
    store.look_ahead(plan)
    assert settled(allocator) == geometry.tokens_in(geometry.groups_for(reach + AHEAD_TOKENS))
    grown_us = allocator.stats().grow_us
    assert not store.apply(StepPlan(1, (Chunk(1, 0, chunk.end, reach + AHEAD_TOKENS - chunk.end, True),)))
    assert allocator.stats().grow_us == grown_us, "nothing was left to grow"
    store.close()


def test_a_prompt_that_began_in_the_rest_of_a_step_is_mapped_for_a_whole_one() -> None:
    """Another's last 180 tokens and its first 20: its next chunk may be of 200."""
    geometry = KvGeometry(layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=600, slots=2, page_bytes=4096)
    allocator = KvAllocator(geometry, pool_groups=2 * geometry.groups_per_slot)
    store = SlotStore(geometry, allocator, torch.float32)
    admissions = tuple(Admission(i, 0, tuple(range(500)), 0, SamplingParams()) for i in (1, 2))
    plan = StepPlan(0, (Chunk(2, 0, 0, 20, False), Chunk(1, 0, 0, 180, False)), admissions)
    assert not store.apply(plan)
    store.look_ahead(plan)
    assert settled(allocator, store.slot_of(2)) >= 220
    grown_us = allocator.stats().grow_us
    assert not store.apply(StepPlan(1, (Chunk(2, 0, 20, 200, False),)))
    assert allocator.stats().grow_us == grown_us, "nothing was left to grow"
    store.close()


def settled(allocator: KvAllocator, slot: int = 0) -> int:
    """Tokens mapped in a slot once the mapper is through."""
    deadline = time.perf_counter() + 20
    while allocator.stats().queued_jobs:
        assert time.perf_counter() < deadline
        time.sleep(0.001)
    return allocator.mapped_tokens(slot)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_an_anchored_store_keeps_its_first_pages_and_counts_without_them(layout: str) -> None:
    """The base of every plane can be read when nobody holds memory, and slot 0 goes to nobody."""
    geometry = KvGeometry(
        layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=256, slots=3, page_bytes=4096, layout=layout
    )
    groups = geometry.groups_for(TOKENS)
    allocator = KvAllocator(geometry, pool_groups=groups + 1)
    store = SlotStore(geometry, allocator, torch.float32, anchor=True)
    assert not store.apply(step(0, admit=1)) and store.slot_of(1) != 0
    assert store.apply(step(1, admit=2)) == {2}  # the whole pool is the first one's
    counts = store.stats()
    assert (counts["kv_slots_active"], counts["kv_groups_in_use"], counts["kv_groups_total"]) == (1, groups, groups)
    assert not store.apply(step(2, release=1))
    allocator.reclaim(0)
    store.set_limit(1)
    assert store.stats()["kv_groups_in_use"] == 0 and store.stats()["kv_groups_total"] == 1
    for layer in range(2):
        for view in store.layer_views(layer):
            assert bool(view[0, 0].isfinite().all())  # a page that is not mapped would end the process
    store.close()
