"""The scheduler's promises: right outputs under any schedule, bounded preemption, abort at any moment, no leak."""

from __future__ import annotations

import dataclasses
import random

import pytest

from engine.core.draft import StepDraft, requeue
from engine.core.errors import ConfigError, InvariantError, RequestError
from engine.core.ledger import EXACT, UPSTREAM, AdmissionRule
from engine.core.loop import EngineLoop
from engine.core.plan import SampledLogprobs, SampledToken, StepPlan, StepResult, TokenLogprobs
from engine.core.policies import ChunkSchedule, policies
from engine.core.request import Request
from engine.core.scheduler import MAX_LONELY_REFUSALS, Scheduler
from tests.core.fakes import (
    VOCAB,
    Collected,
    FakeExecutor,
    expected,
    make_loop,
    make_request,
    make_scheduler,
    next_token,
    run,
)

ALL = policies.names()
ORDERS = ("arrival", "shortest", "deadline")
PAGED = ["sarathi", "simple_chunking", "vllm"]


def random_requests(rng: random.Random, count: int, limit: int) -> list[Request]:
    """Mixed lengths, priorities, stop ids that do strike, min_tokens, and some without a max_tokens."""
    requests = []
    for index in range(count):
        stop = frozenset(rng.sample(range(VOCAB), 40)) if rng.random() < 0.4 else frozenset()
        most = None if rng.random() < 0.05 else rng.randrange(1, limit // 2)
        requests.append(
            make_request(
                f"r{index}",
                rng.randrange(1, limit - 1) if rng.random() < 0.2 else rng.randrange(1, limit // 3),
                most,
                arrival_s=index * 1e-3,
                priority=rng.choice((0, 0, 0, -1, 5)),
                stop_ids=stop,
                min_tokens=rng.randrange(0, most) if most and rng.random() < 0.3 else 0,
            )
        )
    return requests


def random_engine(rng: random.Random, **options: object) -> tuple[EngineLoop, FakeExecutor]:
    """Any policy, depth, group size, budget; often a pool that one request nearly fills."""
    policy = rng.choice(ALL)
    group_tokens = rng.choice((1, 7, 16))
    per_request = -(-120 // group_tokens)
    pool = rng.choice((per_request, per_request + 2, 3 * per_request, 40 * per_request))
    chunk = rng.choice((1, 7, 40, 500)) if policy in ("sarathi", "simple_chunking") else None
    depth, ahead = rng.choice(((1, False), (2, False), (4, False), (2, True), (2, True), (3, True)))
    schedule = None
    if policy == "sarathi" and rng.random() < 0.3:
        chunk, schedule = None, ChunkSchedule(32, 96, 100, 3, rng.choice(("request", "step")))
    scheduler = make_scheduler(
        policy,
        groups=pool,
        group_tokens=group_tokens,
        max_num_seqs=rng.choice((1, 2, 5, 32)),
        max_model_len=120,
        depth=depth,
        ahead=ahead,
        chunk_tokens=chunk,
        schedule=schedule,
        prompt_order=rng.choice(ORDERS) if policy == "sarathi" and schedule is None else "arrival",
    )
    return make_loop(scheduler, group_tokens=group_tokens, seed=rng.randrange(1 << 30), **options)


def assert_clean(loop: EngineLoop, executor: FakeExecutor) -> None:
    """Nothing is left anywhere."""
    ledger = loop.scheduler.ledger
    assert not executor.slots and not executor.plans
    assert ledger.free_groups + ledger.withheld_groups == ledger.total_groups
    assert loop.scheduler.stats()["running"] == loop.scheduler.stats()["waiting"] == 0
    loop.scheduler.check()


def assert_truth(requests: list[Request], seen: Collected, limit: int) -> None:
    """Every request ended as it would have alone."""
    for request in requests:
        outputs, reason = expected(request, limit)
        assert (seen.tokens[request.request_id], seen.reasons[request.request_id]) == (outputs, reason)


@pytest.mark.parametrize("seed", range(60))
def test_every_answer_equals_the_answer_alone(seed: int) -> None:
    """Any policy, depth, pool: tokens, order and finish reasons do not depend on the schedule or on preemption."""
    rng = random.Random(seed)
    loop, executor = random_engine(rng)
    requests = random_requests(rng, 25, 120)
    seen = Collected()
    for request in requests:
        loop.add(request)
        for _ in range(rng.randrange(4)):
            seen.take(loop.step())
            loop.scheduler.check()
    run(loop, seen)
    assert_truth(requests, seen, 120)
    assert_clean(loop, executor)


@pytest.mark.parametrize("seed", range(60))
def test_abort_at_any_moment(seed: int) -> None:
    """Waiting, running, in flight, preempted: an abort is told once, frees everything, and changes nobody else."""
    rng = random.Random(1000 + seed)
    loop, executor = random_engine(rng)
    requests = random_requests(rng, 25, 120)
    seen, aborted = Collected(), set()
    for request in requests:
        loop.add(request)
        for _ in range(rng.randrange(3)):
            seen.take(loop.step())
            if rng.random() < 0.4:
                victim = f"r{rng.randrange(25)}"
                live = victim in loop.scheduler._by_request
                assert loop.abort(victim) is live
                assert loop.abort(victim) is False
                aborted |= {victim} if live else set()
                loop.scheduler.check()
            held = len(executor.slots)
            assert held <= loop.scheduler.max_num_seqs
    run(loop, seen)
    for request in requests:
        outputs, reason = expected(request, 120)
        if request.request_id in aborted:
            assert seen.reasons[request.request_id] == "abort"
            assert seen.tokens[request.request_id] == outputs[: len(seen.tokens[request.request_id])]
        else:
            assert (seen.tokens[request.request_id], seen.reasons[request.request_id]) == (outputs, reason)
    assert_clean(loop, executor)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_aborted_slot_is_free_after_the_next_step(depth: int) -> None:
    """A plan that only releases is submitted, although nothing else is to be done."""
    loop, executor = make_loop(make_scheduler(depth=depth))
    loop.add(make_request("a", 20, 100))
    for _ in range(3):
        loop.step()
    assert len(executor.slots) == 1
    loop.abort("a")
    updates = loop.step()
    while executor.plans:
        updates += loop.step()
    assert [(u.request_id, u.finish_reason) for u in updates if u.finish_reason] == [("a", "abort")]
    assert not executor.slots
    assert executor.steps[-1].releases == (0,) and not executor.steps[-1].chunks
    assert not loop.has_work


def test_results_of_an_aborted_and_reused_name_are_dropped() -> None:
    """The late token of an aborted sequence does not reach a new request of the same id."""
    scheduler = make_scheduler(depth=2)
    scheduler.add(make_request("a", 5, 10))
    first = scheduler.plan(0.0)
    scheduler.abort("a")
    scheduler.add(make_request("a", 5, 10))
    second = scheduler.plan(0.0)
    assert second.releases == (0,) and [c.seq_id for c in second.chunks] == [1]
    updates = scheduler.commit(StepResult(first.step_id, (SampledToken(0, 0, 1),)))
    assert [(u.request_id, u.tokens, u.finish_reason) for u in updates] == [("a", (), "abort")]
    assert [u.tokens for u in scheduler.commit(StepResult(second.step_id, (SampledToken(1, 0, 7),)))] == [(7,)]
    assert scheduler.records[0].dropped == 1


# ---------------------------------------------------------------- stop rules


def test_a_stop_id_ends_a_sequence_and_is_emitted() -> None:
    """Reason "stop"; the id is the last token."""
    request = make_request("a", 5, 50)
    first = next_token(request.prompt)
    loop, _ = make_loop(make_scheduler())
    loop.add(dataclasses.replace(request, stop_ids=frozenset((first,))))
    seen = run(loop)
    assert seen.tokens == {"a": [first]} and seen.reasons == {"a": "stop"}


def test_min_tokens_delays_the_stop_ids() -> None:
    """Not one of the first min_tokens outputs ends the text, the next one may."""
    request = make_request("a", 5, 50, stop_ids=frozenset(range(VOCAB)), min_tokens=7)
    loop, _ = make_loop(make_scheduler())
    loop.add(request)
    assert len(run(loop).tokens["a"]) == 8


def test_the_models_length_ends_a_sequence() -> None:
    """QUIRK 1: max_model_len holds while decoding; prompt and outputs together never exceed it."""
    for max_tokens in (None, 1000):
        loop, executor = make_loop(make_scheduler(max_model_len=64))
        loop.add(make_request("a", 50, max_tokens))
        seen = run(loop)
        assert len(seen.tokens["a"]) == 14 and seen.reasons["a"] == "length"
        assert max(chunk.end for plan in executor.steps for chunk in plan.chunks) < 64


def test_stop_wins_over_length_on_the_last_token() -> None:
    """A model that ends by itself on its last allowed token did stop."""
    request = make_request("a", 5, 1)
    loop, _ = make_loop(make_scheduler())
    loop.add(dataclasses.replace(request, stop_ids=frozenset((next_token(request.prompt),))))
    assert run(loop).reasons == {"a": "stop"}


# ---------------------------------------------------------------- refusals on entry


@pytest.mark.parametrize(
    ("tokens", "groups", "good"), [(255, 64, True), (256, 64, False), (257, 64, False), (63, 4, True), (64, 4, False)]
)
def test_what_can_never_fit_is_refused_on_entry(tokens: int, groups: int, good: bool) -> None:
    """By the model's length (256) or by the pool: value and limit in the message, nothing queued."""
    scheduler = make_scheduler(groups=groups)
    if good:
        scheduler.add(make_request("a", tokens))
        return
    with pytest.raises(RequestError, match=f"the prompt has {tokens} tokens; at most") as caught:
        scheduler.add(make_request("a", tokens))
    assert caught.value.param == "prompt"
    assert not scheduler.has_work


def test_an_empty_prompt_and_a_name_in_use_are_refused() -> None:
    """The name is free again once its request ended."""
    scheduler = make_scheduler()
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(make_request("a", 0))
    scheduler.add(make_request("a", 3))
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(make_request("a", 3))
    scheduler.abort("a")
    scheduler.add(make_request("a", 3))


@pytest.mark.parametrize("policy", ALL)
def test_an_over_long_head_of_the_line_is_ignored_and_told(policy: str) -> None:
    """QUIRK 7: alone in an otherwise empty step, too. It does not block who waits behind it."""
    loop, executor = make_loop(make_scheduler(policy, groups=200))
    loop.scheduler.add(make_request("long", 257), validate=False)
    assert [(u.request_id, u.finish_reason) for u in loop.step()] == [("long", "length")]
    assert not loop.has_work and not executor.steps
    loop.scheduler.add(make_request("long", 257), validate=False)
    loop.add(make_request("short", 5, 3))
    loop.scheduler.add(make_request("long too", 300), validate=False)
    assert run(loop).reasons == {"long": "length", "short": "length", "long too": "length"}


def test_vllm_with_a_small_batch_still_recomputes_a_victim_that_outgrew_it() -> None:
    """A restarted sequence longer than a batch of prompts runs alone instead of being cut off."""
    scheduler = make_scheduler("vllm", groups=10, max_model_len=150, chunk_tokens=40)
    loop, _ = make_loop(scheduler)
    requests = [make_request(f"r{i}", 30, 80, arrival_s=i) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    seen = Collected()
    while scheduler.has_work:
        plan = scheduler.plan(100.0)
        if plan.is_empty:
            continue
        loop.executor.submit(plan)
        seen.take(scheduler.commit(loop.executor.wait()))
    assert scheduler.totals["preempted"] > 0
    assert_truth(requests, seen, 150)
    with pytest.raises(RequestError, match="at most 40"):
        scheduler.add(make_request("x", 41))


# ---------------------------------------------------------------- order


def test_lower_priority_runs_first_ties_by_arrival() -> None:
    """Among the waiting; what runs is not preempted by a better one."""
    loop, _ = make_loop(make_scheduler(max_num_seqs=1))
    loop.add(make_request("running", 5, 4, priority=9))
    loop.step()
    for name, priority in (("c", 1), ("a", 0), ("d", 1), ("b", 0), ("z", -3)):
        loop.add(make_request(name, 5, 2, priority=priority))
    seen = run(loop)
    assert list(seen.reasons) == ["running", "z", "a", "b", "c", "d"]
    assert loop.scheduler.totals["preempted"] == 0


def test_the_victim_is_the_worst_priority_then_the_youngest() -> None:
    """Three of one length fill the pool; the one of priority 5 loses, though it is the oldest."""
    scheduler = make_scheduler(groups=6, max_model_len=90, rule=dataclasses.replace(EXACT, watermark=0.0))
    for name, priority in (("worst", 5), ("old", 0), ("young", 0)):
        scheduler.add(make_request(name, 32, 40, priority=priority))
    executor = FakeExecutor(8)
    preempted: list[int] = []
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        preempted += plan.preempted
        executor.submit(plan)
        scheduler.commit(executor.wait())
    assert preempted[:2] == [0, 2]  # worst, then young; old never


def test_future_arrivals_wait_and_do_not_block_another_priority() -> None:
    """Head of line: the first of the best priority that has arrived."""
    scheduler = make_scheduler()
    scheduler.add(make_request("later", 5, arrival_s=10.0, priority=-1))
    scheduler.add(make_request("now", 5, arrival_s=1.0))
    assert [c.seq_id for c in scheduler.plan(1.0).chunks] == [1]


def test_a_victim_goes_back_before_whoever_came_later() -> None:
    """Also where all arrived at once, as the samples of one request do; upstream's rule puts it in front of all."""
    for rule, order in ((EXACT, [0, 1, 2, 3]), (UPSTREAM, [2, 0, 1, 3])):
        scheduler = make_scheduler(rule=rule)
        for index in range(4):
            scheduler.add(make_request(f"r{index}", 5))
        waiting = scheduler.queues.waiting
        victim = next(sequence for sequence in waiting if sequence.seq_id == 2)
        waiting.remove(victim)
        requeue(scheduler.queues, scheduler.ledger, victim)
        assert [sequence.seq_id for sequence in waiting] == order
        assert len(waiting) == 4


# ---------------------------------------------------------------- preemption


class Watching(StepDraft):
    """A draft that notes whenever the oldest of the best priority that runs is preempted."""

    broken = 0

    def preempt(self, victim):  # type: ignore[no-untyped-def]
        running = [s for s in (*self.running, *self.kept, victim)]
        if len(running) > 1 and victim.order == min(s.order for s in running):
            type(self).broken += 1
        super().preempt(victim)


@pytest.mark.parametrize("policy", PAGED)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("groups", [8, 12, 20])
def test_progress_under_a_preemption_storm(policy: str, depth: int, groups: int) -> None:
    """R26, F13: the oldest is never preempted, nobody more than 3 times, so at most 3 x requests in all; all end."""
    chunk = None if policy == "vllm" else 32
    scheduler = make_scheduler(
        policy, groups=groups, max_model_len=120, max_num_seqs=32, depth=depth, chunk_tokens=chunk
    )
    scheduler.draft_class = type("Watch", (Watching,), {"broken": 0})
    loop, executor = make_loop(scheduler)
    requests = [make_request(f"r{i}", 4 + i % 9, 60 + i % 50, arrival_s=i * 1e-6) for i in range(40)]
    most = 0
    seen = Collected()
    for request in requests:
        scheduler.add(request)
    while loop.has_work:
        seen.take(loop.step())
        scheduler.check()
        most = max([most, *(s.preemptions for s in scheduler._live.values())])
    assert_truth(requests, seen, 120)
    assert_clean(loop, executor)
    assert 0 < scheduler.totals["preempted"] <= 3 * len(requests)
    assert most <= 3
    assert scheduler.draft_class.broken == 0


def test_a_capped_sequence_waits_until_it_fits_whole_and_is_no_victim() -> None:
    """After 3 preemptions: memory up to its end is reserved, so it never grows and never goes."""
    rule = dataclasses.replace(EXACT, preemption_cap=1, watermark=0.0)
    scheduler = make_scheduler(groups=8, max_model_len=100, rule=rule)
    loop, executor = make_loop(scheduler)
    requests = [make_request(f"r{i}", 10, 80, arrival_s=i * 1e-6) for i in range(8)]
    for request in requests:
        scheduler.add(request)
    whole_seen = 0
    while loop.has_work:
        loop.step()
        for sequence in scheduler.queues.running:
            if sequence.whole:
                whole_seen += 1
                assert scheduler.ledger.holds(sequence.seq_id) == 6  # ceil(90 / 16)
    assert whole_seen > 0
    assert max(executor.epochs.values()) <= 1
    assert_clean(loop, executor)


@pytest.mark.parametrize("rule", [EXACT, UPSTREAM], ids=["exact", "upstream"])
def test_a_victim_is_not_readmitted_by_the_step_that_preempted_it(rule: AdmissionRule) -> None:
    """QUIRK 4. The fake executor asserts the same for every other test."""
    for seed in range(10):
        rng = random.Random(seed)
        groups = rng.choice((9, 12))
        scheduler = make_scheduler(groups=groups, max_model_len=120, max_num_seqs=16, chunk_tokens=16, rule=rule)
        loop, executor = make_loop(scheduler)
        for request in random_requests(rng, 20, 100):
            scheduler.add(request)
        run(loop)
        assert any(plan.preempted for plan in executor.steps)
        for plan in executor.steps:
            assert set(plan.preempted) <= set(plan.releases)
            assert not set(plan.releases) & {c.seq_id for c in plan.chunks}


def test_a_victim_in_flight_loses_its_late_token() -> None:
    """Depth 2: its result arrives after the preemption, of an older epoch, and is dropped; the answer is right."""
    scheduler = make_scheduler(groups=9, max_model_len=130, max_num_seqs=8, depth=2, chunk_tokens=24)
    loop, executor = make_loop(scheduler)
    requests = [make_request(f"r{i}", 20 + 3 * i, 60, arrival_s=i * 1e-6) for i in range(12)]
    for request in requests:
        scheduler.add(request)
    seen = run(loop)
    assert_truth(requests, seen, 130)
    assert_clean(loop, executor)
    assert sum(record.dropped for record in scheduler.records) > 0


@pytest.mark.parametrize(("policy", "order"), [*((name, "arrival") for name in ALL), ("sarathi", "shortest"),
                                               ("sarathi", "deadline")])  # fmt: skip
def test_no_request_starves_under_continuous_arrivals(policy: str, order: str) -> None:
    """New requests arrive every step, for ever; each one of the first hundred ends within a bound of steps."""
    scheduler = make_scheduler(policy, groups=60, max_model_len=96, max_num_seqs=12, prompt_order=order)
    loop, _ = make_loop(scheduler)
    rng = random.Random(3)
    added: dict[str, int] = {}
    ended: dict[str, int] = {}
    for step in range(3000):
        if scheduler.stats()["waiting"] < 20:
            name = f"r{step}"
            loop.add(make_request(name, rng.randrange(1, 60), rng.randrange(1, 30), arrival_s=-9.0 + step * 1e-3))
            added[name] = step
        for update in loop.step():
            if update.finish_reason:
                ended[update.request_id] = step
    old = [name for name, step in added.items() if step < 2000]
    assert len(old) > 100
    assert all(name in ended for name in old)
    assert max(ended[name] - added[name] for name in old) < 600


# ---------------------------------------------------------------- memory refused by the executor


@pytest.mark.parametrize("seed", range(12))
def test_random_refusals_change_no_answer(seed: int) -> None:
    """One chunk in ten is refused its memory: preempted, retried, everything ends right, or with a named error."""
    rng = random.Random(seed)
    loop, executor = random_engine(rng, refuse=0.1)
    requests = random_requests(rng, 20, 120)
    for request in requests:
        loop.add(request)
    seen = run(loop)
    assert loop.scheduler.totals["refused"] > 0
    for request in requests:
        outputs, reason = expected(request, 120)
        name = request.request_id
        if seen.reasons[name] == "error":
            assert "refused 3 times" in seen.errors[name]
            assert seen.tokens[name] == outputs[: len(seen.tokens[name])]
        else:
            assert (seen.tokens[name], seen.reasons[name]) == (outputs, reason)
    assert_clean(loop, executor)


@pytest.mark.parametrize("policy", PAGED)
@pytest.mark.parametrize("depth", [1, 2])
def test_less_memory_than_the_ledger_believes(policy: str, depth: int) -> None:
    """The allocator has a quarter of the groups: no livelock, every answer right."""
    scheduler = make_scheduler(policy, groups=40, max_model_len=120, depth=depth, max_num_seqs=16)
    loop, executor = make_loop(scheduler, physical=10)
    requests = [make_request(f"r{i}", 10 + 7 * i % 50, 40, arrival_s=i * 1e-6) for i in range(24)]
    for request in requests:
        loop.add(request)
    seen = run(loop, max_steps=4000)
    assert_truth(requests, seen, 120)
    assert scheduler.totals["refused"] > 0
    assert_clean(loop, executor)


def test_a_request_without_memory_even_alone_ends_with_an_error() -> None:
    """Three refusals with nothing else running; the others, which fit, are right."""
    scheduler = make_scheduler(groups=40, max_model_len=120)
    loop, executor = make_loop(scheduler, physical=3)
    big = make_request("big", 60, 10)
    small = [make_request(f"s{i}", 10, 20) for i in range(5)]
    for request in (small[0], big, *small[1:]):
        loop.add(request)
    seen = run(loop, max_steps=1000)
    assert seen.reasons["big"] == "error"
    assert f"refused {MAX_LONELY_REFUSALS} times" in seen.errors["big"]
    assert_truth(small, seen, 120)
    assert_clean(loop, executor)


# ---------------------------------------------------------------- failures and misuse


@pytest.mark.parametrize("depth", [1, 3])
def test_one_chunk_that_fails_ends_one_request(depth: int) -> None:
    """R9: error for that one, the right answer for everybody else."""
    scheduler = make_scheduler(groups=200, max_model_len=120, depth=depth, max_num_seqs=16)
    loop, executor = make_loop(scheduler, fail=0.01)
    requests = [make_request(f"r{i}", 10, 30) for i in range(40)]
    for request in requests:
        loop.add(request)
    seen = run(loop)
    failed = [request for request in requests if seen.reasons[request.request_id] == "error"]
    assert 0 < len(failed) < 30
    assert all(seen.errors[request.request_id] == "logits are not finite" for request in failed)
    assert_truth([request for request in requests if request not in failed], seen, 120)
    assert_clean(loop, executor)


def test_a_result_that_is_not_the_awaited_one_changes_nothing() -> None:
    """Another step's, one without an answer, one about a stranger: InvariantError, and the right one still counts."""
    scheduler = make_scheduler()
    with pytest.raises(InvariantError, match="no step is in flight"):
        scheduler.commit(StepResult(0))
    scheduler.add(make_request("a", 5, 3))
    plan = scheduler.plan(0.0)
    for bad in (
        StepResult(plan.step_id + 1, (SampledToken(0, 0, 1),)),
        StepResult(plan.step_id),
        StepResult(plan.step_id, refused=(9,)),
        StepResult(plan.step_id, (SampledToken(0, 0, 1), SampledToken(0, 0, 2))),
    ):
        with pytest.raises(InvariantError):
            scheduler.commit(bad)
    assert [u.tokens for u in scheduler.commit(StepResult(plan.step_id, (SampledToken(0, 0, 4),)))] == [(4,)]


@pytest.mark.parametrize("field", ["max_num_seqs", "max_model_len", "depth"])
def test_a_setting_below_one_is_refused(field: str) -> None:
    """Value and name."""
    with pytest.raises(ConfigError, match=f"{field}=0"):
        make_scheduler(**{field: 0}) if field != "max_model_len" else Scheduler(  # type: ignore[arg-type]
            make_scheduler().policy, make_scheduler().ledger, max_num_seqs=1, max_model_len=0
        )


def test_depth_is_a_limit_and_no_sequence_is_in_two_steps() -> None:
    """Four steps in flight, the fifth plan is empty; chunks of one prompt never overlap."""
    scheduler = make_scheduler(depth=4, chunk_tokens=8, groups=200)
    for index in range(12):
        scheduler.add(make_request(f"r{index}", 50))
    plans = [scheduler.plan(0.0) for _ in range(5)]
    assert [plan.is_empty for plan in plans] == [False] * 4 + [True]
    ids = [chunk.seq_id for plan in plans for chunk in plan.chunks]
    assert len(set(ids)) == len(ids)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("seed", range(6))
def test_records_add_up(seed: int) -> None:
    """Tokens sampled = tokens told; tokens run = tokens planned; one record a submitted step."""
    rng = random.Random(seed)
    loop, executor = random_engine(rng)
    for request in random_requests(rng, 20, 120):
        loop.add(request)
    seen = run(loop)
    records = loop.take_records()
    assert len(records) == len(executor.steps) and not loop.take_records()
    assert [record.step_id for record in records] == [plan.step_id for plan in executor.steps]
    for record, plan in zip(records, executor.steps, strict=True):
        assert record.num_tokens == plan.num_tokens
        assert record.prefill_chunks + record.decode_tokens == len(plan.chunks)
        assert record.reserved_groups <= record.total_groups
    assert sum(record.sampled for record in records) == sum(map(len, seen.tokens.values()))
    assert sum(record.finished for record in records) == 20
    stats = loop.stats()
    assert stats["outputs_total"] == sum(record.sampled for record in records)
    assert stats["preempted_total"] == sum(record.preempted for record in records)
    assert stats["steps_total"] == len(records)


def test_planning_ahead_follows_tokens_that_are_still_to_come() -> None:
    """ahead: a decode is planned again before its token came, at the place behind it; a stop known late costs one
    token, which nobody sees; a length known beforehand costs none."""
    scheduler = make_scheduler(depth=2, ahead=True, groups=200)
    first = make_request("a", 5, max_tokens=3)
    scheduler.add(first)
    plans = [scheduler.plan(0.0), scheduler.plan(0.0)]
    assert [[(c.start, c.length) for c in plan.chunks] for plan in plans] == [[(0, 5)], [(5, 1)]]
    loop, executor = make_loop(make_scheduler(depth=2, ahead=True, groups=200))
    outputs, _ = expected(first, 256)
    stopping = make_request("b", first.prompt, max_tokens=50, stop_ids=frozenset({outputs[1]}))
    seen = Collected()
    for request in (first, stopping):
        loop.add(request)
    run(loop, seen)
    assert_truth([first, stopping], seen, 256)
    ran = {name: sum(c.samples for plan in executor.steps for c in plan.chunks if c.seq_id == name) for name in (0, 1)}
    assert ran == {0: 3, 1: len(seen.tokens["b"]) + 1}
    assert_clean(loop, executor)


class Telling:
    """An executor that tells the logprobs of every other sequence: each token with its negative."""

    def __init__(self, inner: FakeExecutor) -> None:
        self.inner = inner

    def submit(self, plan: StepPlan) -> None:
        self.inner.submit(plan)

    def wait(self) -> StepResult:
        result = self.inner.wait()
        told = tuple(SampledLogprobs(t.seq_id, t.epoch, TokenLogprobs((t.token,), (-float(t.token),)))
                     for t in result.tokens if t.seq_id % 2)  # fmt: skip
        return dataclasses.replace(result, logprobs=told)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("seed", range(30))
def test_logprobs_stay_with_their_tokens(seed: int) -> None:
    """Through refusals, preemptions, dropped results of older epochs, aborts and steps in flight: who asked gets one a
    token, nobody else any."""
    rng = random.Random(seed)
    loop, executor = random_engine(rng, refuse=0.1, fail=0.02)
    loop.executor = Telling(executor)  # type: ignore[assignment]
    asked = {}
    for request in random_requests(rng, 20, 100):
        try:
            asked[request.request_id] = loop.add(request) % 2 == 1
        except RequestError:
            continue
    while loop.has_work:
        if rng.random() < 0.02:
            loop.abort(rng.choice(list(asked)))
        for update in loop.step():
            wanted = tuple(TokenLogprobs((token,), (-float(token),)) for token in update.tokens)
            assert update.logprobs == (wanted if asked[update.request_id] else ())
