"""The one loop: it never spins, never blocks without a step in flight, and survives an executor that raises."""

from __future__ import annotations

import logging
import random

import pytest

from engine.core.clock import VirtualClock
from engine.core.errors import ConfigError, InvariantError, RequestError
from engine.core.ledger import ADMISSION_RULES
from engine.core.loop import MAX_LOST_STEPS, EngineLoop
from engine.core.plan import StepPlan, StepResult
from engine.core.policies import policies
from tests.core.fakes import FakeExecutor, expected, make_loop, make_request, make_scheduler, run


class Raising(FakeExecutor):
    """Raises at the given calls of submit or wait (counted from 0); everything else as the fake."""

    at_submit: frozenset[int] = frozenset()
    at_wait: frozenset[int] = frozenset()
    submits = waits = 0

    def submit(self, plan: StepPlan) -> None:
        self.submits += 1
        if self.submits - 1 in self.at_submit:
            raise RuntimeError("prompt tokens 1 2 3")
        super().submit(plan)

    def wait(self) -> StepResult:
        self.waits += 1
        if self.waits - 1 in self.at_wait:
            plan = self.plans.popleft()
            for seq_id in plan.releases:
                self.slots.pop(seq_id, None)
            raise RuntimeError("prompt tokens 1 2 3")
        return super().wait()


@pytest.mark.parametrize("policy", policies.names())
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_step_makes_progress(policy: str, depth: int) -> None:
    """As long as there is work, a call submits, commits or reports: no call does nothing (a caller would spin)."""
    loop, executor = make_loop(make_scheduler(policy, groups=40, max_model_len=100, depth=depth))
    for index in range(20):
        loop.add(make_request(f"r{index}", 5 + index, 30))
    while loop.has_work:
        before = len(executor.steps) - len(executor.plans), len(executor.steps)
        updates = loop.step()
        assert updates or before != (len(executor.steps) - len(executor.plans), len(executor.steps))
    assert loop.step() == []


def test_the_pipeline_is_filled_before_anyone_waits() -> None:
    """Depth 3: three steps are in flight when the first result is asked for; at the end it drains."""
    loop, executor = make_loop(make_scheduler(depth=3, groups=200, chunk_tokens=16))
    for index in range(9):
        loop.add(make_request(f"r{index}", 40, 10))
    loop.step()
    assert len(executor.steps) == 3 and len(executor.plans) == 2
    run(loop)
    assert not executor.plans


def test_what_arrives_in_the_future_has_arrived() -> None:
    """A clock that differs between processes must not make the loop wait, or spin."""
    scheduler = make_scheduler()
    loop = EngineLoop(scheduler, FakeExecutor(8), clock=VirtualClock(5.0))
    loop.add(make_request("a", 5, 2, arrival_s=1e9))
    assert run(loop, max_steps=5).reasons == {"a": "length"}


def test_validate_queues_nothing() -> None:
    """The same error as add(), before anything exists."""
    loop, _ = make_loop(make_scheduler())
    with pytest.raises(RequestError, match="300 tokens"):
        loop.validate(make_request("a", 300))
    loop.validate(make_request("a", 30))
    assert not loop.has_work


@pytest.mark.parametrize("where", ["at_submit", "at_wait"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_lost_step_ends_its_requests_only(where: str, depth: int, caplog: pytest.LogCaptureFixture) -> None:
    """The executor raises once: an error for the requests of that step, right answers for all that come after."""
    scheduler = make_scheduler(depth=depth, max_num_seqs=4, groups=200)
    executor = Raising(4)
    setattr(executor, where, frozenset((6,)))
    loop = EngineLoop(scheduler, executor)
    requests = [make_request(f"r{index}", 12, 20) for index in range(16)]
    for request in requests:
        loop.add(request)
    with caplog.at_level(logging.ERROR):
        seen = run(loop)
    lost = {name for name, reason in seen.reasons.items() if reason == "error"}
    assert 1 <= len(lost) <= 4 and len(seen.reasons) == 16
    assert all("RuntimeError" in seen.errors[name] and "1 2 3" not in seen.errors[name] for name in lost)
    for request in requests:
        outputs, reason = expected(request, 256)
        if request.request_id not in lost:
            assert (seen.tokens[request.request_id], seen.reasons[request.request_id]) == (outputs, reason)
    assert not executor.slots, "the slots of the lost step were given back"
    assert loop.stats()["lost_steps_total"] == 1


@pytest.mark.parametrize("where", ["at_submit", "at_wait"])
def test_an_executor_that_only_raises_is_taken_for_dead(where: str) -> None:
    """A few steps in a row: step() raises what the executor raised, instead of failing requests for ever."""
    executor = Raising(8)
    setattr(executor, where, frozenset(range(1000)))
    loop = EngineLoop(make_scheduler(), executor)
    for index in range(50):
        loop.add(make_request(f"r{index}", 12, 20))
    calls = 0
    with pytest.raises(RuntimeError):
        while True:
            loop.step()
            calls += 1
    assert calls == MAX_LOST_STEPS - 1


def test_an_answer_that_breaks_the_contract_loses_its_step_only() -> None:
    """A result without a token for a sampling chunk: its requests end with an error, nobody hangs."""

    class Silent(FakeExecutor):
        def wait(self) -> StepResult:
            result = super().wait()
            return StepResult(result.step_id) if result.step_id == 3 else result

    loop = EngineLoop(make_scheduler(), Silent(8))
    loop.add(make_request("a", 5, 20))
    seen = run(loop)
    assert seen.reasons == {"a": "error"}
    assert InvariantError.__name__ in seen.errors["a"]
    loop.add(make_request("b", 5, 20))
    assert run(loop).reasons == {"b": "length"}


def test_stats_and_close() -> None:
    """The executor's counts are added; close() is idempotent and reaches the executor."""
    executor = FakeExecutor(8)
    loop = EngineLoop(make_scheduler(), executor, executor_stats=lambda: {"kv_mapped_bytes": 7})
    assert loop.stats()["kv_mapped_bytes"] == 7
    loop.close()
    loop.close()
    assert executor.closed
    assert "kv_mapped_bytes" not in loop.stats()


@pytest.mark.parametrize("policy", policies.names())
@pytest.mark.parametrize(("depth", "ahead"), [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize("rule", ADMISSION_RULES)
def test_the_kv_limit_moves_while_requests_run(policy: str, depth: int, ahead: bool, rule: str) -> None:
    """Lowered under use and raised again at random: everyone still gets the answer it gets alone, and while more is
    held than the limit nobody grows. What would leave a live request without an end is refused and changes nothing."""
    scheduler = make_scheduler(policy, groups=60, max_model_len=100, depth=depth, ahead=ahead, chunk_tokens=None,
                               rule=ADMISSION_RULES[rule])  # fmt: skip
    told: list[int] = []
    executor = FakeExecutor(scheduler.max_num_seqs, ahead)
    loop = EngineLoop(scheduler, executor, limit_memory=told.append)
    requests = [make_request(f"r{i}", 3 + 5 * i % 60, 30) for i in range(24)]
    for request in requests:
        loop.add(request)
    rng, ledger, moves, refusals = random.Random(f"{policy} {depth} {rule}"), scheduler.ledger, 0, 0
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    over = False
    while loop.has_work:
        if rng.random() < 0.2:
            limit, before = rng.randint(1, rng.choice((8, 60))), (ledger.total_groups, ledger.free_groups)
            try:
                assert loop.set_kv_limit(limit) == ledger.reserved_groups
                moves += 1
                assert told[-1] == limit == ledger.total_groups
            except RequestError:
                refusals += 1
                assert (ledger.total_groups, ledger.free_groups) == before
        held = ledger.reserved_groups
        for update in loop.step():
            assert update.finish_reason in (None, "length"), update
            outputs[update.request_id] += update.tokens
        scheduler.check()
        if held > ledger.total_groups:
            over = True
            assert ledger.reserved_groups <= held
    assert moves > 3 and refusals > 0 and (over or policy in ("orca", "faster_transformer"))
    for request in requests:
        assert outputs[request.request_id] == expected(request, 100)[0]
    assert ledger.reserved_groups == 0


def test_the_kv_limit_has_a_range_and_an_owner() -> None:
    """At most the pool of the start; later requests are measured against it; an engine that cannot change says so."""
    loop = EngineLoop(make_scheduler(groups=10, max_model_len=100), FakeExecutor(8), limit_memory=lambda groups: None)
    for groups in (0, -1, 11):
        with pytest.raises(ConfigError, match=r"1\.\.10"):
            loop.set_kv_limit(groups)
    assert loop.set_kv_limit(2) == 0
    with pytest.raises(RequestError, match="at most 31"):
        loop.add(make_request("long", 32, 1))
    loop.set_kv_limit(10)
    loop.add(make_request("long", 32, 1))
    fixed, _ = make_loop(make_scheduler())
    with pytest.raises(ConfigError, match="cannot change"):
        fixed.set_kv_limit(1)
