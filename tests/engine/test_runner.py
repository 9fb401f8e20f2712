"""A runner on a GPU that is made up: what of a step the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.request import SamplingParams
from engine.kv.slots import SlotStore
from engine.runner.runner import Runner
from vattention_ext import KvAllocator, KvGeometry


class FakeEvent:
    """Stands in for torch.cuda.Event; the class remembers what was called, in order."""

    calls: tuple[str, ...] = ()

    def record(self) -> None:
        """The work before it is under way."""
        FakeEvent.calls += ("record",)

    def synchronize(self) -> None:
        """The host waits."""
        FakeEvent.calls += ("wait",)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """One that takes its device for a GPU and computes nothing."""
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=16, element_bytes=4, max_tokens=256, slots=2, page_bytes=4096)
    store = SlotStore(geometry, KvAllocator(geometry, "memfd", pool_groups=8), torch.float32)
    nothing: Any = None
    made = Runner(nothing, store, nothing)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(store, "fence", lambda: None)
    monkeypatch.setattr(made, "_sample", lambda host, picks, launched: None, raising=False)
    monkeypatch.setattr(FakeEvent, "calls", ())
    made.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    yield made
    store.close()


def test_a_step_that_samples_nothing_is_waited_for(runner: Runner) -> None:
    """Or the host would run ahead through a whole prompt, as deep as the driver's queue; a plan without work does not
    wait for anything."""
    known = Admission(1, 0, tuple(range(100)), 0, SamplingParams())
    launched = runner.launch(StepPlan(1, (Chunk(1, 0, 0, 40, False),), (known,)))
    assert FakeEvent.calls == ("record",)
    assert runner.collect(launched).tokens == () and FakeEvent.calls == ("record", "wait")
    runner.collect(runner.launch(StepPlan(2, releases=(1,))))
    assert FakeEvent.calls == ("record", "wait")
