"""The slot store: what a finished request leaves in memory, and who may read it."""

from __future__ import annotations

import pytest
import torch

from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.request import SamplingParams
from engine.kv.slots import SlotStore
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
