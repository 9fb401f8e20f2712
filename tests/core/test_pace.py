"""Chunks that adapt to step times: learnt from what was, never above the bound, the same again from the same times."""

from __future__ import annotations

import json
import random

import pytest

from engine.core.config import EngineConfig
from engine.core.errors import ConfigError
from engine.core.ledger import ADMISSION_RULES, KvLedger
from engine.core.plan import StepResult
from engine.core.policies import ChunkSchedule, Pace, make_policy
from engine.core.policies.sarathi import CONSIDERED
from engine.core.request import Request, SamplingParams
from engine.core.scheduler import Scheduler
from scripts import simulate
from tests.core import fakes
from tests.core.fakes import make_loop, make_request, make_scheduler


def test_times_are_learnt_and_followed_when_they_change() -> None:
    """Base and slope come out of noisy steps; a slower machine is noticed within some dozens of steps."""
    rng, pace = random.Random(1), Pace(0.02, 0.04)
    assert pace.chunk_tokens(0) is None
    for base, slope in ((0.006, 2e-5), (0.010, 4e-5)):
        for _ in range(150):
            tokens = rng.choice([0, 0, 64, 256, 512])
            pace.observe(tokens, (base + slope * tokens) * rng.uniform(0.97, 1.03))
        assert pace.predict() == (pytest.approx(base, rel=0.05), pytest.approx(slope, rel=0.05))
    # from the target to the bound as requests wait; ever a multiple of 32, and never none
    calm = pace.chunk_tokens(0)
    burst = pace.chunk_tokens(100_000)  # four seconds of prefill came at once: that alone changes little
    for _ in range(300):
        crowded = pace.chunk_tokens(100_000)
    assert burst is not None and calm is not None and burst < 1.5 * calm
    assert calm is not None and crowded is not None and calm % 32 == crowded % 32 == 0
    assert calm == pytest.approx(0.010 / 4e-5, abs=48) and crowded == pytest.approx(0.030 / 4e-5, abs=96)
    assert pace.chunk_tokens(10**9) == crowded
    assert Pace(0.001, 0.001, _sums=list(pace._sums)).chunk_tokens(9) == 32


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, float]:
    """A simulated day: 8 ms a step and 20 us a token."""
    day = "--requests 250 --rate 14 --base-s 0.008 --token-s 2e-5 --abort 0"
    room = "--max-model-len 4096 --pool-tokens 400000 --chunk-tokens 2048"
    assert simulate.main([*day.split(), *room.split(), *flags]) == 0
    numbers: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return numbers


@pytest.mark.parametrize("depth", ["1", "2"])
def test_simulated_days_stay_within_the_bound(depth: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens come as closely as asked, at a price in the time to the first; and each day repeats exactly."""
    flags = ("--tbt-target-ms", "12", "--tbt-bound-ms", "14", "--depth", depth)
    plain, paced, again = run(capsys, "--depth", depth), run(capsys, *flags), run(capsys, *flags)
    assert again == paced
    if depth == "1":  # with two steps in flight, the simulation's tokens of a step come with the next one's time
        assert plain["tbt_p99_s"] > 0.0155 > 0.0142 > paced["tbt_p99_s"]
    assert paced["ttft_p99_s"] > plain["ttft_p99_s"]
    assert paced["finished"] == plain["finished"] == 250


def test_what_contradicts_a_pace_is_refused() -> None:
    """Value, range and fix, for the settings and for the policies."""
    for settings, words in (
        ({"tbt_bound_ms": 20}, "needs --tbt-target-ms"), ({"tbt_target_ms": 20, "tbt_bound_ms": 10}, "is below"),
        ({"tbt_target_ms": 20, "scheduler": "vllm"}, "needs --scheduler sarathi"),
        ({"tbt_target_ms": 20, "dynamic_chunking": True}, "without a dynamic"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            EngineConfig(**settings)  # type: ignore[arg-type]
    assert EngineConfig(tbt_target_ms=20, tbt_bound_ms=30).tbt_bound_ms == 30
    with pytest.raises(ConfigError, match="at most bound_s"):
        Pace(0.02, 0.01)
    for name in ("vllm", "orca", "faster_transformer", "simple_chunking"):
        with pytest.raises(ConfigError, match="does not adapt"):
            make_policy(name, max_model_len=100, pace=Pace(0.01, 0.02))
    with pytest.raises(ConfigError, match="contradict"):
        make_policy("sarathi", max_model_len=100, pace=Pace(0.01, 0.02), schedule=ChunkSchedule(32, 64, 100, 2))


def test_the_shortest_prompt_goes_first_and_none_starves() -> None:
    """A short prompt overtakes a long one in progress; a long one that waited long enough is overtaken no more."""
    def step(policy_order: str, waited_s: float) -> list[tuple[str, int]]:
        ledger = KvLedger(4096, lambda tokens: -(-tokens // 16), ADMISSION_RULES["exact"])
        policy = make_policy("sarathi", max_model_len=8192, chunk_tokens=512, prompt_order=policy_order)
        scheduler = Scheduler(policy, ledger, max_num_seqs=8, max_model_len=8192)
        names = {}
        for name, tokens, arrival_s in (("long", 4000, 0.0), ("short", 300, waited_s)):
            names[scheduler.add(Request(name, (1,) * tokens, SamplingParams(max_tokens=4), arrival_s))] = name
        scheduler.plan(0.0)  # the long one begins alone
        scheduler.commit(StepResult(0, (), (), ()))
        return [(names[chunk.seq_id], chunk.length) for chunk in scheduler.plan(waited_s).chunks]

    assert step("arrival", 0.01) == [("long", 512)]
    assert step("shortest", 0.01) == [("short", 300), ("long", 212)]
    assert step("shortest", 1.0) == [("long", 512)]  # 3,488 left, and 10,000 fewer for its second
    with pytest.raises(ConfigError, match="takes prompts as they arrive"):
        make_policy("vllm", max_model_len=64, prompt_order="shortest")
    with pytest.raises(ConfigError, match="needs --scheduler sarathi"):
        EngineConfig(prompt_order="shortest", scheduler="orca")


@pytest.mark.parametrize(("groups", "slots"), [(128, 1), (66, 8)])
def test_a_long_prompt_goes_on_when_a_shorter_one_finds_no_room(groups: int, slots: int) -> None:
    """No slot or no memory for the shorter one, which would come first: the one in progress gets the step."""
    scheduler = make_scheduler(groups=groups, max_num_seqs=slots, max_model_len=2048, chunk_tokens=64,
                               prompt_order="shortest")  # fmt: skip
    loop, _ = make_loop(scheduler)
    loop.add(make_request("long", 1000, 4))
    loop.step()
    loop.add(make_request("short", 100, 4))
    assert fakes.run(loop, max_steps=60).reasons == {"long": "length", "short": "length"}


def test_the_shortest_is_sought_among_the_first_who_wait() -> None:
    """However many wait, a step looks at no more than CONSIDERED of them."""
    scheduler = make_scheduler(groups=4096, max_num_seqs=2, chunk_tokens=16, prompt_order="shortest")
    for i in range(CONSIDERED + 2):
        scheduler.add(make_request(f"r{i}", {CONSIDERED - 1: 8, CONSIDERED: 2}.get(i, 60)))
    chunks = scheduler.plan(0.0).chunks
    assert [(chunk.seq_id, chunk.length) for chunk in chunks] == [(CONSIDERED - 1, 8), (0, 8)]
