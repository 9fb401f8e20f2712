"""The soak on a CPU: rules that are always valid, and a pool that is too small for what comes."""

from __future__ import annotations

import json
import random

import pytest

from scripts import gpu_soak


def test_any_rules_are_valid() -> None:
    """Answers short and long; some must have as many tokens as they may."""
    rng = random.Random(1)
    drawn = [gpu_soak.rules(rng, 250, 500) for _ in range(100_000)]
    assert min(rules.max_tokens or 0 for rules in drawn) < 5 == max(rules.min_tokens for rules in drawn)


def test_a_pool_that_overflows(capsys: pytest.CaptureFixture[str]) -> None:
    """Requests are preempted, all end, nothing is held."""
    pool = "--kv-pool-bytes 1048576 --kv-page-bytes 4096 --max-model-len 512 --max-num-seqs 16"
    load = "--seconds 3 --waiting 8 --prompt-tokens 300 --answer-tokens 100"
    assert gpu_soak.main(["--shape", "tiny", "--device", "cpu", *pool.split(), *load.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["preempted_total"] > 0 and found["ended"]["length"] > 10 and found["errors"] == 0
