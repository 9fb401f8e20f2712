"""The core's command line tools run, and notice what they are for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from engine.core.plan import SampledToken, StepResult
from scripts import bench_rho, bench_step, simulate


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "orca", "faster_transformer", "simple_chunking"])
@pytest.mark.parametrize(("depth", "refuse", "pool"), [(1, 0.0, 6000), (2, 0.002, 4000)])
def test_simulated_days_keep_their_promises(
    policy: str, depth: int, refuse: float, pool: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random arrivals, aborts, refusals: everyone ends with the answer it gets alone."""
    flags = f"--policy {policy} --depth {depth} --refuse {refuse} --pool-tokens {pool} --requests 120 --seed 4"
    assert simulate.main([*flags.split(), "--max-model-len", "1000", "--abort", "0.05"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["finished"] + numbers["aborted"] + numbers["failed"] == 120
    assert numbers["aborted"] > 0


def test_a_day_with_a_forecast_keeps_the_same_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """Aborts, refused memory and outputs that end by themselves: the forecast counts exactly what runs, after every
    step, and preempts less often than none."""
    flags = "--requests 150 --seed 5 --pool-tokens 5000 --max-tokens 600 --rate 200 --refuse 0.001"
    totals = []
    for risk in ([], ["--admission-risk", "1e-3"]):
        assert simulate.main([*flags.split(), *risk]) == 0
        totals.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert totals[0]["preempted"] > totals[1]["preempted"]
    assert totals[1]["aborted"] > 0 and totals[1]["refused"] > 0


def test_knowing_rho_admits_more_at_no_more_preemptions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The benchmark's claim, on one small seed; its answers are checked against those of each request alone."""
    assert bench_rho.main(["--requests", "120", "--seeds", "1", "--out", str(tmp_path / "r.json")]) == 0
    arms = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert arms == json.loads((tmp_path / "r.json").read_text())["arms"]
    known, one = arms["rho known"], arms["rho = 1"]
    assert known["running"] > 1.05 * one["running"] and known["base_tokens_per_s"] > 1.05 * one["base_tokens_per_s"]
    assert known["preemptions"] <= one["preemptions"] < arms["no forecast"]["preemptions"]


def test_a_simulation_notices_a_wrong_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge is not blind: one altered token in some result is found, and the seed is named."""
    whole = simulate.HashExecutor.wait
    rng = random.Random(1)

    def altered(self: simulate.HashExecutor) -> StepResult:
        result = whole(self)
        if not result.tokens or rng.random() > 0.02:
            return result
        first = result.tokens[0]
        wrong = SampledToken(first.seq_id, first.epoch, (first.token + 1) % simulate.VOCAB)
        return StepResult(result.step_id, (wrong, *result.tokens[1:]), result.refused)

    monkeypatch.setattr(simulate.HashExecutor, "wait", altered)
    assert simulate.main(["--requests", "50", "--seed", "9"]) == 1
    assert "seed 9: AssertionError" in capsys.readouterr().err


def test_the_step_benchmark_measures_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small numbers, no limit: every sequence grows in every step and crosses groups at the stated rate."""
    monkeypatch.setattr(bench_step, "settle_heap", lambda: None)  # the test process keeps its collector
    assert bench_step.main(["--running", "64", "--waiting", "5", "--steps", "60", "--limit-ms", "1000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["crossings_per_step"] == pytest.approx(4, abs=0.5)
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
