"""The soak on a CPU: rules that are always valid, and a pool that is too small for what comes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from scripts import gpu_soak


def test_any_rules_are_valid() -> None:
    """Answers short and long; some must have as many tokens as they may."""
    rng = random.Random(1)
    drawn = [gpu_soak.rules(rng, 250, 500) for _ in range(100_000)]
    assert min(rules.max_tokens or 0 for rules in drawn) < 5 == max(rules.min_tokens for rules in drawn)


def test_a_pool_that_overflows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Requests are preempted, all end, nothing is held; the file says what ran, of which commit and where."""
    monkeypatch.setenv("TESSERA_COMMIT", "0123abc")
    file = tmp_path / "soak.json"
    pool = "--kv-pool-bytes 524288 --kv-page-bytes 4096 --max-model-len 512 --max-num-seqs 16"
    load = "--seconds 3 --waiting 8 --prompt-tokens 100 --answer-tokens 200"
    asked = ["--shape", "tiny", "--device", "cpu", *load.split(), "--json", str(file), *pool.split()]
    assert gpu_soak.main(asked) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert found["workload"] == "soak: tiny, 3 s, 8 in line, seed 0" and found["commit"] == "0123abc"
    assert found["command"].startswith("python -m scripts.gpu_soak --shape tiny --device cpu --seconds 3 ")
    assert found["environment"]["versions"]["torch"] and "gpu" in found["environment"]
    assert found["preempted_total"] > 0 and found["ended"]["length"] > 10 and found["errors"] == 0
