"""Orders of prompts: deadlines against every subset that could be in time, fairness, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from time import perf_counter

import pytest

from engine.core.config import EngineConfig
from engine.core.errors import ConfigError
from engine.core.load import Load
from engine.core.policies import Pace, make_policy
from engine.core.policies._deadline import KEPT_SPEED, PATIENCE, PUT_OFF_MOST, Deadline
from engine.core.policies._order import PromptCost, Shortest
from engine.core.sequence import Sequence
from scripts import simulate
from tests.core.fakes import make_loop, make_request, make_scheduler, run

COST = PromptCost(KEPT_SPEED / 1000, 0.0)  # so that Deadline counts on 1,000 tokens a second
WHOLE = 1 << 20


def prompt(seq_id: int, tokens: int, arrival_s: float = 0.0, priority: int = 0) -> Sequence:
    """One that waits."""
    return Sequence(seq_id, make_request(f"r{seq_id}", tokens, arrival_s=arrival_s, priority=priority), WHOLE)


def ids(line: list[Sequence]) -> list[int]:
    """Who they are."""
    return [sequence.seq_id for sequence in line]


def generous(target_s: float) -> Deadline:
    """A deadline before which as many may be put off as ever at once."""
    order = Deadline(target_s)
    for _ in range(1000):
        order.started()
    return order


def in_time(line: list[Sequence], now_s: float, target_s: float) -> int:
    """How many have run by their target, one after another at 1,000 tokens a second."""
    count = 0
    for sequence in line:
        now_s += sequence.left / 1000
        count += now_s <= sequence.arrival_s + target_s + 1e-9
    return count


@pytest.mark.parametrize("seed", range(60))
def test_as_many_are_in_time_as_can_be(seed: int) -> None:
    """Up to PUT_OFF_MOST put off, nobody finds a line with more in time: every subset is tried, by deadline."""
    rng = random.Random(seed)
    prompts = [prompt(i, rng.randrange(50, 400), rng.uniform(-0.5, 0.0)) for i in range(8)]
    line = generous(1.0).line(prompts, 0.0, COST, WHOLE)
    assert sorted(sequence.seq_id for sequence in line) == list(range(8))
    by_deadline = sorted(prompts, key=lambda sequence: sequence.arrival_s)
    best = max(
        size for size in range(9) for some in itertools.combinations(by_deadline, size)
        if in_time(list(some), 0.0, 1.0) == size
    )  # fmt: skip
    assert 8 - best <= PUT_OFF_MOST
    assert in_time(line, 0.0, 1.0) == best


@pytest.mark.parametrize("seed", range(20))
def test_the_shortest_first_unless_it_makes_another_late(seed: int) -> None:
    """With time to spare it is plainly the shortest first; at any load it costs nobody the target that oldest first
    kept."""
    rng = random.Random(seed)
    prompts = [prompt(i, rng.randrange(50, 500), rng.uniform(-0.5, 0.0)) for i in range(8)]
    calm = Deadline(100.0).line(prompts, 0.0, COST, WHOLE)
    assert [sequence.left for sequence in calm] == sorted(sequence.left for sequence in prompts)
    line = Deadline(2.0).line(prompts, 0.0, COST, WHOLE)  # nobody may be put off yet
    oldest_first = sorted(prompts, key=lambda sequence: sequence.arrival_s)
    assert in_time(line, 0.0, 2.0) >= in_time(oldest_first, 0.0, 2.0)


def test_no_more_than_a_share_is_put_off_and_only_for_a_while() -> None:
    """One in a hundred that start; it goes last, keeps that place, and is due after PATIENCE targets."""
    prompts = [prompt(0, 700), prompt(1, 300, 0.1), prompt(2, 200, 0.2)]
    order = Deadline(1.0)
    for _ in range(99):
        order.started()
    assert ids(order.line(prompts, 0.2, COST, WHOLE)) == [0, 1, 2]  # one will be late, none may wait: as they came
    order.started()
    assert ids(order.line(prompts, 0.2, COST, WHOLE)) == [2, 1, 0]
    more = [*prompts, prompt(3, 600, 0.3), prompt(4, 700, 0.3)]
    line = ids(order.line(more, 0.3, COST, WHOLE))
    assert line[-1] == 0 and [one.put_off for one in more] == [True, False, False, False, False]  # the share is spent
    late = [prompts[0], prompt(5, 690, PATIENCE - 0.95), prompt(6, 650, PATIENCE - 0.94)]
    assert ids(order.line(late, PATIENCE - 0.91, COST, WHOLE))[0] == 0  # it would be too late behind another


def test_nobody_is_put_off_where_it_saves_nobody() -> None:
    """Not one who is late with nobody behind, not for those who are late anyhow, not where the order would stay."""
    for now_s, prompts in (
        (1.5, [prompt(0, 10)]),
        (3.0, [prompt(i, 100, 0.01 * i) for i in range(20)]),
        (7.9, [prompt(0, 700), prompt(1, 300, 7.4), prompt(2, 250, 7.4)]),
    ):  # fmt: skip
        order = generous(1.0)
        assert ids(order.line(prompts, now_s, COST, WHOLE))[0] == 0
        assert not any(one.put_off for one in prompts) and order._allowance == PUT_OFF_MOST


def test_no_urgent_prompt_is_put_off_for_another() -> None:
    """Those of a lower priority run behind it either way."""
    prompts = [prompt(0, 400, priority=-1), prompt(1, 300, priority=-1), prompt(2, 200, -0.6), prompt(3, 100, -0.6)]
    line = generous(1.0).line(prompts, 0.0, COST, WHOLE)
    assert ids(line) == [1, 0, 2, 3] and not any(one.put_off for one in prompts)
    prompts = [prompt(0, 100, priority=-1), prompt(1, 500, -0.3), prompt(2, 300, -0.2)]
    assert ids(generous(1.0).line(prompts, 0.0, COST, WHOLE)) == [0, 2, 1] and prompts[1].put_off


def test_a_prompt_that_takes_most_of_the_target_by_itself_waits_and_is_not_counted() -> None:
    """Whenever it came, it would make others late. What it takes counts what its tokens attend to."""
    for cost, tokens in ((COST, 1100), (PromptCost(COST.token_s, 8e-7), 900)):
        order = generous(1.0)
        line = order.line([prompt(0, tokens), prompt(1, 400, 0.1), prompt(2, 450, 0.1)], 0.1, cost, WHOLE)
        assert ids(line) == [1, 2, 0] and order._allowance == PUT_OFF_MOST
    assert ids(generous(1.0).line([prompt(0, 900), prompt(1, 50, 0.1)], 0.1, COST, WHOLE)) == [0, 1]


def test_priorities_and_requests_that_were_started_anew_come_first() -> None:
    """Whatever is shorter; and nobody is put off for who had its first token long ago."""
    anew = prompt(8, 800)
    anew.outputs.append(5)
    for first in (prompt(7, 900, priority=-1), anew):
        prompts = [prompt(0, 100), prompt(1, 200), first]
        assert generous(1.0).line(prompts, 0.0, COST, WHOLE)[0] is first
        assert not any(one.put_off for one in prompts)


def test_a_prompt_that_starts_again_earns_nobody_a_place() -> None:
    """Its chunk was refused, and it is admitted a second time."""
    scheduler = make_scheduler(groups=64, chunk_tokens=32, prompt_order="deadline")
    order = scheduler.policy.order  # type: ignore[attr-defined]
    loop, executor = make_loop(scheduler, refuse=0.4, seed=2)
    loop.add(make_request("r", 40, 4))
    run(loop)
    assert sum(len(plan.admissions) for plan in executor.steps) > 1
    assert order._allowance == pytest.approx(0.01)


@pytest.mark.parametrize(("tokens", "target_s"), [((16, 64), 1000.0), ((100, 800), 300.0), ((100, 800), 10.0)])
def test_planning_stays_quick_with_all_that_are_looked_at(tokens: tuple[int, int], target_s: float) -> None:
    """512 wait: all in time, most, few. The fastest of five, against what the other order takes for its one sorting."""
    rng = random.Random(2)
    prompts = [prompt(i, rng.randrange(*tokens), -rng.uniform(0, target_s / 2)) for i in range(512)]

    def fastest(order: Deadline | Shortest) -> float:
        times = []
        for _ in range(5):
            began = perf_counter()
            order.line(prompts, 0.0, COST, 2048)
            times.append(perf_counter() - began)
        return min(times)

    assert fastest(generous(target_s)) < 15 * fastest(Shortest())


def test_nobody_starves_when_more_arrives_than_can_be_served() -> None:
    """Twenty seconds at 1.3 times what can be served: nobody waits longer than the oldest-first line would be long by
    a target's patience."""
    rng, order, target_s = random.Random(4), Deadline(0.5), 0.5
    waiting: list[Sequence] = []
    waits: list[float] = []
    now_s, arrival_s, n = 0.0, 0.0, 0
    while now_s < 40:
        while arrival_s <= min(now_s, 20.0):
            waiting.append(prompt(n, rng.randrange(20, 300), arrival_s))
            arrival_s, n = arrival_s + 0.16 / 1.3 * rng.uniform(0.5, 1.5), n + 1
        if waiting:
            first = order.line(waiting, now_s, COST, 1)[0]
            order.started()
            waiting.remove(first)
            now_s += first.left / 1000
            waits.append(now_s - first.arrival_s)
        else:
            now_s += 0.01
    assert not waiting and n > 150
    assert max(waits) < 20 * 0.3 + PATIENCE * target_s + 1.0


def test_what_prompts_take_beside_decodes() -> None:
    """Their share of steps as they are now; nothing known is None; decodes that take longer leave a little."""
    pace = Pace(0.02, 0.03)
    assert pace.prompt_cost(Load(), 2048) is None
    rng = random.Random(1)
    for _ in range(300):
        load = Load(rng.randrange(1, 2000), rng.randrange(0, 200_000), rng.uniform(0, 4e6))
        pace.observe(load, 0.001 + load.tokens * 20e-6 + load.cached * 40e-9 + load.pairs * 1e-9)

    def cost(beside: Load, most: int = 2048) -> tuple[float, float]:
        found = pace.prompt_cost(beside, most)
        assert found is not None
        return found

    beside = Load(10, 100_000)
    token_s = 0.02 / ((0.02 - 0.001 - 0.004) / 20e-6)
    assert cost(beside) == (pytest.approx(token_s, rel=0.05), pytest.approx(1e-9, rel=0.05))
    assert PromptCost(*cost(beside)).seconds(1000, 3000) == pytest.approx(1000 * token_s + 3.5e-3, rel=0.05)
    for _ in range(100):  # a second of prompts waits: steps go up to the bound
        pace.reach(beside, 0, 50_000, 2048)
    assert cost(beside)[0] == pytest.approx(0.03 / ((0.03 - 0.001 - 0.004) / 20e-6), rel=0.05)
    assert cost(Load(), 256)[0] == pytest.approx(20e-6 + 0.001 / 256, rel=0.05)
    assert cost(Load(200, 10_000_000))[0] > 0.01


@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_crowded_day_by_deadline(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """More than can be served comes at once: 99 in 100 first tokens by their target, and half of them much sooner."""
    day = "--requests 500 --rate 60 --base-s 0.008 --token-s 2e-5 --abort 0 --tbt-target-ms 12 --tbt-bound-ms 25"
    room = "--max-model-len 4096 --pool-tokens 400000 --chunk-tokens 2048"

    def times(*order: str) -> dict[str, float]:
        assert simulate.main([*day.split(), *room.split(), "--seed", seed, "--prompt-order", *order]) == 0
        numbers: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert numbers["finished"] == 500
        return numbers

    oldest, deadline = times("arrival"), times("deadline", "--ttft-target-ms", "700")
    assert deadline["ttft_p99_s"] < 0.7 * 1.02
    assert deadline["ttft_p50_s"] < 0.2 * oldest["ttft_p50_s"]


def test_what_a_deadline_needs() -> None:
    """A target, a pace to know the speed by, and sarathi."""
    for settings, words in (
        ({"prompt_order": "deadline"}, "needs --ttft-target-ms and --tbt-target-ms"),
        ({"prompt_order": "deadline", "ttft_target_ms": 500.0}, "needs --ttft-target-ms and --tbt-target-ms"),
        ({"ttft_target_ms": 500.0}, "needs --prompt-order deadline"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            EngineConfig(**settings)  # type: ignore[arg-type]
    assert EngineConfig(prompt_order="deadline", ttft_target_ms=500.0, tbt_target_ms=20).ttft_target_ms == 500
    with pytest.raises(ConfigError, match="a TTFT target, and a pace"):
        make_policy("sarathi", max_model_len=64, prompt_order="deadline", ttft_target_s=1.0)
    with pytest.raises(ConfigError, match="above 0"):
        Deadline(0.0)
