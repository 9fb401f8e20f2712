"""What each policy promises about a step's content, whatever the load."""

from __future__ import annotations

import pytest

from engine.core.draft import StepDraft
from engine.core.errors import ConfigError, InvariantError
from engine.core.plan import StepPlan
from engine.core.policies import ChunkSchedule, PolicyOptions, make_policy, policies
from engine.core.scheduler import Scheduler
from tests.core.fakes import FakeExecutor, make_loop, make_request, make_scheduler, run

ALL = policies.names()


def plans_of(scheduler: Scheduler, prompts: list[int], outputs: int = 8) -> list[StepPlan]:
    loop, executor = make_loop(scheduler)
    for index, tokens in enumerate(prompts):
        loop.add(make_request(f"r{index}", tokens, outputs))
    run(loop)
    return [plan for plan in executor.steps if plan.chunks]


def kinds(plan: StepPlan, executor_goal: dict[int, int]) -> list[str]:
    """"p" for a prompt's chunk, "d" for a decode, in order."""
    return ["p" if chunk.end <= executor_goal[chunk.seq_id] else "d" for chunk in plan.chunks]


def test_policies_are_found_by_file_name() -> None:
    """Adding a policy is adding a file."""
    assert ALL == ["faster_transformer", "orca", "sarathi", "simple_chunking", "vllm"]
    with pytest.raises(ConfigError, match="did you mean 'sarathi'"):
        make_policy("sarthi", max_model_len=10)


@pytest.mark.parametrize("name", ALL)
def test_prefills_come_before_decodes(name: str) -> None:
    """The order that executors and recordings rely on."""
    prompts = [5, 40, 9, 77, 30, 2, 60]
    scheduler = make_scheduler(name, groups=200, chunk_tokens=24 if "chunk" in name or name == "sarathi" else None)
    for plan in plans_of(scheduler, prompts):
        order = "".join(kinds(plan, dict(enumerate(prompts))))
        assert "dp" not in order


def test_sarathi_shares_one_budget_and_never_stalls_a_decode() -> None:
    """decodes + prompt tokens <= chunk_tokens, and every sequence past its prompt is in every step."""
    prompts = [40, 100, 7, 30, 90, 12]
    scheduler = make_scheduler("sarathi", groups=200, chunk_tokens=32)
    decoding: set[int] = set()
    for plan in plans_of(scheduler, prompts, outputs=20):
        assert plan.num_tokens <= 32
        in_step = {chunk.seq_id for chunk in plan.chunks}
        ended = set(plan.releases)
        assert decoding - ended <= in_step
        decoding = (decoding - ended) | {chunk.seq_id for chunk in plan.chunks if chunk.samples}


def test_vllm_runs_prompts_or_decodes() -> None:
    """Never both in a step, prompts whole."""
    prompts = [40, 100, 7, 30]
    for plan in plans_of(make_scheduler("vllm", groups=200), prompts):
        assert len(set(kinds(plan, dict(enumerate(prompts))))) == 1
        assert all(chunk.samples for chunk in plan.chunks)


def test_faster_transformer_starts_a_batch_when_the_last_ended() -> None:
    """No admission while anything runs."""
    scheduler = make_scheduler("faster_transformer", groups=200, max_num_seqs=3)
    running: set[int] = set()
    for plan in plans_of(scheduler, [10, 20, 30, 40, 50]):
        running -= set(plan.releases)
        if plan.admissions:
            assert not running
        running |= {admission.seq_id for admission in plan.admissions}


def test_simple_chunking_takes_turns() -> None:
    """Chunks of prompts and decodes never share a step."""
    prompts = [40, 100, 7, 30]
    for plan in plans_of(make_scheduler("simple_chunking", groups=200, chunk_tokens=24), prompts):
        assert len(set(kinds(plan, dict(enumerate(prompts))))) == 1
        assert plan.num_tokens <= 24


@pytest.mark.parametrize("name", ["orca", "faster_transformer"])
def test_whole_prompt_policies_refuse_a_budget(name: str) -> None:
    """A setting that cannot be honoured is refused."""
    with pytest.raises(ConfigError, match="chunk_tokens=64"):
        make_policy(name, max_model_len=100, chunk_tokens=64)


@pytest.mark.parametrize("name", [name for name in ALL if name != "sarathi"])
def test_only_sarathi_has_a_schedule(name: str) -> None:
    """Likewise."""
    with pytest.raises(ConfigError, match="no dynamic chunking"):
        make_policy(name, max_model_len=100, schedule=ChunkSchedule(32, 64, 100, 2))


def test_schedule_sizes() -> None:
    """The published example, and rounding to 32 with ties to even."""
    schedule = ChunkSchedule(128, 2048, 16384, 16)
    assert schedule.sizes == tuple(range(2048, 0, -128))
    assert schedule.stage_tokens == 1024
    assert ChunkSchedule(32, 128, 100, 3).sizes == (128, 64, 32)  # 80 is 2.5 * 32
    assert ChunkSchedule(32, 128, 100, 1).sizes == (32,)


def test_a_prompt_beyond_the_schedule_stays_in_the_last_stage() -> None:
    """QUIRK 6 is an assertion upstream."""
    schedule = ChunkSchedule(32, 128, 100, 2)
    assert schedule.chunk_tokens(99) == 32
    assert schedule.chunk_tokens(10_000) == 32


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ((31, 64, 10, 1), "low_tokens=31"),
        ((0, 64, 10, 1), "low_tokens=0"),
        ((32, 65, 10, 1), "high_tokens=65"),
        ((96, 64, 10, 1), "low_tokens=96 is above"),
        ((32, 64, 0, 1), "max_tokens=0"),
        ((32, 64, 10, 0), "stages=0"),
    ],
)
def test_a_bad_schedule_is_refused(fields: tuple[int, int, int, int], named: str) -> None:
    """Value and range."""
    with pytest.raises(ConfigError, match=named):
        ChunkSchedule(*fields)


def test_a_bad_budget_is_refused() -> None:
    """Likewise for the options."""
    with pytest.raises(ConfigError, match="budget='batch'"):
        ChunkSchedule(32, 64, 10, 1, "batch")
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        PolicyOptions(100, 0)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("budget", ["request", "step"])
def test_dynamic_chunks_are_never_negative_and_everyone_ends(budget: str, depth: int) -> None:
    """QUIRK 3: more decodes than a late stage's size. The executor asserts length >= 1; nobody starves."""
    schedule = ChunkSchedule(32, 128, 300, 4, budget)
    scheduler = make_scheduler(
        groups=2000, max_num_seqs=80, max_model_len=600, schedule=schedule, depth=depth
    )
    loop, executor = make_loop(scheduler)
    for index in range(60):
        loop.add(make_request(f"s{index}", 3, 60))
    loop.add(make_request("long", 500, 5))
    for index in range(60):
        loop.add(make_request(f"t{index}", 3, 60))
    seen = run(loop)
    assert len(seen.reasons) == 121
    assert all(len(plan.chunks) <= 80 for plan in executor.steps)


def test_the_step_budget_holds_under_load_and_the_published_one_does_not() -> None:
    """QUIRK 5: a late prompt (32) and an early one (256) in one step."""
    tokens = {}
    for budget in ("request", "step"):
        schedule = ChunkSchedule(32, 256, 400, 4, budget)
        scheduler = make_scheduler(groups=2000, max_model_len=600, schedule=schedule)
        plans = plans_of(scheduler, [500, 500, 500, 500])
        late = [p for p in plans if any(c.start >= 300 and not c.samples for c in p.chunks)]
        tokens[budget] = max(plan.num_tokens for plan in late)
    assert tokens["request"] > 200
    assert tokens["step"] <= 32 + 1


def test_the_draft_refuses_what_a_policy_gets_wrong() -> None:
    """A policy that ignores budgets and slots cannot break them; one that miscounts tokens is told."""
    scheduler = make_scheduler(groups=20, max_num_seqs=2)
    for index in range(4):
        scheduler.add(make_request(f"r{index}", 10))
    draft = StepDraft(scheduler.queues, scheduler.ledger, now_s=0.0, max_num_seqs=2, prompt_limit=256)
    draft.budget_tokens = 15
    head = draft.next_waiting()
    assert head is not None
    assert draft.admit(head, 10) is True
    second = draft.next_waiting()
    assert second is not None
    refusal = draft.admit(second, 10)
    assert not refusal and (refusal.reason, refusal.need, refusal.free) == ("budget", 10, 5)
    with pytest.raises(InvariantError, match="11 tokens proposed"):
        draft.budget_tokens = None
        draft.admit(second, 11)


def test_the_draft_refuses_a_full_house_and_an_empty_pool() -> None:
    """Reasons: slots, pages."""
    scheduler = make_scheduler(groups=2, max_num_seqs=2)
    for index in range(4):
        scheduler.add(make_request(f"r{index}", 10))
    draft = StepDraft(scheduler.queues, scheduler.ledger, now_s=0.0, max_num_seqs=3, prompt_limit=256)
    for reason in (None, None, "pages"):
        head = draft.next_waiting()
        assert head is not None
        outcome = draft.admit(head, 10)
        assert (outcome is True) if reason is None else outcome.reason == reason
    full = StepDraft(scheduler.queues, scheduler.ledger, now_s=0.0, max_num_seqs=2, prompt_limit=256)
    full.kept = draft.kept
    head = full.next_waiting()
    assert head is not None
    refusal = full.admit(head, 10)
    assert not refusal and refusal.reason == "slots"


def test_fake_executor_notices_a_step_too_many() -> None:
    """The judge of these tests is not blind."""
    with pytest.raises(AssertionError, match="empty plan"):
        FakeExecutor(1).submit(StepPlan(0))
