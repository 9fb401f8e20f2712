"""rho in a real engine: whatever it is said to be, every request gets the same tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.core.config import EngineConfig
from engine.core.errors import ConfigError
from tests import models

MAX_TOKENS = 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model."""
    return models.tiny_llama_dir(tmp_path_factory.mktemp("rho"), 3)


def figures(rho: float) -> dict[str, object]:
    """A file of `rho` out, and what outputs cost an earlier deployment in base tokens."""
    side = {"documents": 1000, "base_tokens": 10**6, "patched_tokens": round(rho * 10**6), "se": 1e-3, "phi": 1.0,
            "q50": rho, "q95": rho, "q99": rho, "rho_max": 9.0}  # fmt: skip
    return {"statistics_out": {"forced": side}, "output_base_tokens": [5 + index % 70 for index in range(1000)]}


def serve(model: Path, temperature: float, **settings: object) -> tuple[list[list[int]], dict[str, float]]:
    """Tokens of 14 requests, which end at stop ids or at MAX_TOKENS, in a pool for about four; and the engine's
    numbers."""
    stops = tuple(range(0, models.TINY_VOCAB, 40))
    with LLM(str(model), dtype="float32", max_model_len=160, max_num_seqs=14, kv_page_bytes=4096,
             kv_pool_groups=26, **settings) as llm:  # fmt: skip
        params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=index, stop_token_ids=stops)
                  for index in range(14)]
        prompts = [[3 + (7 * index + place) % 500 for place in range(12 + index)] for index in range(14)]
        results = llm.generate(prompts, params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in results], llm.engine.stats()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_rho(model: Path, tmp_path: Path, temperature: float) -> None:
    """rho forced to 0.3, 1 and 3, and no forecast: identical tokens, greedy and seeded, at a tight pool; the number of
    steps and of preemptions differs, so it was no idle setting."""
    truth, plain = serve(model, temperature)
    steps, preempted = [plain["steps_total"]], [plain["preempted_total"]]
    for rho in (0.3, 1.0, 3.0):
        file = tmp_path / f"{rho}.json"
        file.write_text(json.dumps(figures(rho)))
        tokens, stats = serve(model, temperature, token_reduction=str(file), token_reduction_domain="forced",
                              admission_risk=1e-3)  # fmt: skip
        assert tokens == truth
        steps.append(stats["steps_total"])
        preempted.append(stats["preempted_total"])
    assert len({len(output) for output in truth}) > 3 or temperature == 0
    assert steps[1] < steps[3] and steps[1] <= steps[2] <= steps[3]
    assert preempted[0] > preempted[3] == 0


def test_a_number_without_provenance_is_taken_and_warned_about(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """0.75: one warning that says how to measure it. The same with provenance in a file: none."""
    with caplog.at_level(logging.WARNING):
        LLM(str(model), max_model_len=64, kv_pool_groups=26, token_reduction="0.75").close()
    assert sum("rho 0.75" in line and "scripts.patch verify" in line for line in caplog.messages) == 1
    caplog.clear()
    file = tmp_path / "vouched.json"
    file.write_text('{"rho": 0.75, "provenance": "measured on last month\'s notes by the records team"}')
    LLM(str(model), max_model_len=64, kv_pool_groups=26, token_reduction=str(file)).close()
    assert not [line for line in caplog.messages if "rho" in line]


@pytest.mark.parametrize(("settings", "words"), [
    ({"admission_risk": 1e-3, "admission": "upstream"}, "--admission-risk 0.001 needs --admission exact"),
    ({"admission_risk": 1e-3, "scheduler": "orca"}, "reserves the whole context"),
    ({"admission_risk": 0.9}, "not a number in 1e-09..0.5"),
])  # fmt: skip
def test_contradictions_are_refused(settings: dict[str, object], words: str) -> None:
    """A forecast where nothing grows, or in the published admission, is an error and not ignored."""
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings)  # type: ignore[arg-type]
