"""rho in the server: counted for a few requests off the event loop, shown in /metrics, advertised in the card."""

from __future__ import annotations

import json
from pathlib import Path

from engine.core.config import EngineConfig
from engine.patching.artefact_files import write
from engine.patching.base import load_base
from engine.serve.metrics import Metrics
from engine.serve.reduction import EVERY, context_card, context_of
from engine.serve.text_worker import count_both
from engine.tokenization import load_tokenizer
from tests.patch.bases import SP_TEXT, small_patch
from tests.serve.harness import running, tiny_folder, wait_until

SIDE = {"documents": 100, "base_tokens": 10**4, "patched_tokens": 7_000, "se": 0.01, "phi": 1.0, "q50": 0.7,
        "q95": 0.75, "q99": 0.8, "rho_max": 4.0}  # fmt: skip


def patched_folder(tmp: Path, meta: dict[str, object]) -> Path:
    """A model folder with a small patch; as many ids as the model has rows is nobody's concern here."""
    folder = tiny_folder(tmp / "model")
    write(small_patch(folder, load_base(folder), SP_TEXT, removed_count=0, meta=meta), folder / "patch")
    return folder


def test_one_text_in_both_vocabularies(tmp_path: Path) -> None:
    """Special tokens spell nothing; an unpatched tokenizer counts the same twice."""
    folder = patched_folder(tmp_path, {})
    patched, plain = load_tokenizer(folder), load_tokenizer(tiny_folder(tmp_path / "plain"))
    text = SP_TEXT[0]
    ids, base = patched.encode(text, False), plain.encode(text, False)
    counted = count_both(patched, [*ids, *patched.special_ids])
    assert (counted.own, counted.base) == (len(ids), len(base)) and len(ids) < len(base)
    counted = count_both(plain, base)
    assert (counted.own, counted.base) == (len(base), len(base))


def test_live_figures_and_the_card(tmp_path: Path) -> None:
    """One sample in EVERY is counted on both sides, under the domain's name; nothing else about it leaves. Without
    removed tokens no text costs more than in the base, whatever rho_max is stored."""
    folder = patched_folder(tmp_path, {"statistics": {"clinic": SIDE}})
    body = {"model": "tiny", "prompt": SP_TEXT[0], "max_tokens": 4, "n": 1}
    with running(tmp_path, "--model", str(folder), "--served-model-name", "tiny", "--token-reduction-domain",
                 "clinic") as server:  # fmt: skip
        http = server.client()
        card = http.get("/v1/models/tiny").json()
        assert card["base_context"] == {"tokens": int(256 / 0.8), "confidence": 0.99, "domain": "clinic",
                                        "guaranteed_tokens": 256}  # fmt: skip
        assert "is 320 base tokens for 99 %" in server.text()
        seen = 'tessera_token_reduction_sampled_base_tokens_total{domain="clinic",side="%s"}'

        def total(side: str) -> float:
            lines = http.get("/metrics").text.splitlines()
            return next((float(line.split()[-1]) for line in lines if line.startswith(seen % side)), 0.0)

        for _ in range(EVERY):
            assert http.post("/v1/completions", json=body).status_code == 200
        assert wait_until(lambda: total("in") > 0 and total("out") > 0)
        once = total("in")
        for _ in range(EVERY):
            http.post("/v1/completions", json=body)
        assert wait_until(lambda: total("in") == 2 * once)
        text = http.get("/metrics").text
        assert 'tessera_token_reduction_ratio{domain="clinic",side="out"}' in text
        assert json.dumps(body["prompt"]) not in text


def test_a_plain_model_advertises_nothing() -> None:
    """No patch: no field in the card and no gauges of rho, whatever else the engine reports."""
    reduction, context = context_of(EngineConfig(), None, 4096)
    assert context is None and context_card(context, reduction.domain) == {}
    metrics = Metrics()
    metrics.know_domain(reduction.domain)
    metrics.take_stats({"running": 3.0, "expected_growth_groups": 7.0})
    text = metrics.text().decode()
    assert "tessera_kv_expected_growth_groups 7.0" in text and 'side="out"' not in text
