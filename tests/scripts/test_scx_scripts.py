"""SCX's benchmarks and accuracy scripts on tiny models: exact lengths, honest grids, scores that are the model's."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams
from engine.core.errors import ConfigError
from scripts import bench, scx_accuracy, scx_lm_eval
from scripts.benching import engines, scx
from scripts.benching.ceilings import Device
from scripts.benching.prompts import fixed_text
from scripts.draw_scx import main as draw
from scripts.scx_scoring import CHUNK_TOKENS, score
from tests import models

TINY = ["--shape", "tiny", "--dtype", "float32", "--max-num-seqs", "8", "--kv-pool-bytes", "64MiB", "--kv-page-bytes",
        "65536"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings are not measured here, and the test process keeps its collector."""
    monkeypatch.setattr(engines, "measure_device", lambda kind, dtype: Device(kind, 1e10, 1e11))
    monkeypatch.setattr(engines, "settle_heap", lambda: None)
    monkeypatch.setattr(logging.getLogger("engine"), "setLevel", lambda level: None)  # other tests read its warnings


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LLM]]:
    """A tiny model in float32, plain and with every layer mixed."""
    folder = models.tiny_llama_dir(tmp_path_factory.mktemp("tiny"), 51, max_position_embeddings=1024)
    settings: dict[str, Any] = {"dtype": "float32", "kv_pool_bytes": 32 << 20, "max_num_seqs": 4}
    made = {"plain": LLM(str(folder), scx_layers="", **settings),
            "mix": LLM(str(folder), scx_layers="all", scx_scheme="mix", **settings)}  # fmt: skip
    yield made
    for llm in made.values():
        llm.close()


# ---------------------------------------------------------------- bench scx


def records(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[list[dict[str, Any]], str]:
    """The records of a run that ends well, and everything that it said before."""
    assert bench.main(["scx", *TINY, *more]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    return list(found["records"]), said


def test_the_grid_has_every_variant_in_every_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Names, ratios to plain, and bytes that are the formula's to the last one; the record draws."""
    out = tmp_path / "grid.json"
    found, said = records(capsys, "--prompts", "24,40", "--outputs", "3,6", "--requests", "2", "--rounds", "2",
                          "--json", str(out), "--variants", "plain,0,first+last,all", "--scheme", "mix")  # fmt: skip
    cells = ["2x24+3", "2x40+3", "2x24+6", "2x40+6"]
    names = [(record["workload"], record["variant"]) for record in found]
    assert names == [(cell, name) for cell in cells for name in ("plain", "0", "first+last", "all")]
    for record in found:
        figures = {figure["name"]: figure for figure in record["figures"]}
        assert len(figures["out_tok_s"]["runs"]) == 2
        if record["variant"] == "plain":
            assert "of_plain" not in figures and "layers" not in record["details"]
            continue
        details = record["details"]
        assert len(figures["of_plain"]["runs"]) == 2 and min(figures["of_plain"]["runs"]) > 0
        assert details["bytes_a_token_and_layer"] == details["formula_bytes_a_token_and_layer"]
        layers, count = {"0": ("0", 1), "first+last": ("0,1", 2), "all": ("all", 2)}[record["variant"]]
        steps = int(record["workload"][-1])  # a prompt's, which gives the first token, and one for each other
        assert details["layers"] == layers and details["round_trips"] == 2 * steps * count
    assert "first+last [out tok/s]" in said
    draw([str(out), "--out", str(tmp_path / "picture.svg")])
    assert (tmp_path / "picture.svg").read_text().count("<svg") == 1


def test_a_budget_leaves_cells_out_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits is measured for every variant; what does not, and what the model is too short for, for none."""

    class Clock:
        """Every look takes 3 s."""

        now = 0.0

        def now_s(self) -> float:
            """Later each time."""
            self.now += 3.0
            return self.now

    monkeypatch.setattr(scx, "MonotonicClock", Clock)
    found, said = records(capsys, "--prompts", "24,32,40", "--outputs", "3", "--requests", "2", "--rounds", "3",
                          "--budget-s", "45")  # fmt: skip
    measured = [record["workload"] for record in found if record["variant"] == "plain"]
    assert 1 <= len(measured) < 3 and "left out: 2x40+3 would take" in said
    for variant in ("0", "first+last"):
        assert [record["workload"] for record in found if record["variant"] == variant] in (measured, measured[:1], [])
    capsys.readouterr()
    monkeypatch.undo()
    monkeypatch.setattr(engines, "measure_device", lambda kind, dtype: Device(kind, 1e10, 1e11))
    found, said = records(capsys, "--prompts", "24,64", "--outputs", "3", "--requests", "1", "--rounds", "1",
                          "--max-model-len", "40")  # fmt: skip
    assert {record["workload"] for record in found} == {"1x24+3"} and "left out: 1x64+3 is longer" in said


@pytest.mark.parametrize(("flags", "said"), [
    (["--prompts", "1m"], "'1m' is not a number of tokens"), (["--scx-layers", "0"], "--scx-layers would be every"),
    (["--variants", "0,plain"], "must begin with plain"), (["--prompts", "99", "--max-model-len", "40"], "no cell"),
    (["--variants", "plain,7"], "layer 7 is outside 0..1"), (["--prompts", "9", "--cells", "9+3"], "--cells names"),
])  # fmt: skip
def test_bad_grids_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names what is wrong."""
    outputs = [] if "--cells" in flags else ["--outputs", "3"]
    assert bench.main(["scx", *TINY, *outputs, "--requests", "1", *flags]) == 2
    assert said in capsys.readouterr().err


def test_lengths_as_people_write_them() -> None:
    """k is 1,024."""
    assert scx.lengths("1k, 512,32K") == [1024, 512, 32768]
    assert scx.device_of(["--device", "cuda:1"]) == scx.device_of(["--device=cuda"]) == "cuda"
    assert scx.device_of([]) == scx.device_of(["--dtype", "float32"]) == "cpu"
    assert scx.cells_of("32k+1024, 512+1K") == [(32768, 1024), (512, 1024)]
    for text in ("32k", "1+2+3", "1k+x"):
        with pytest.raises(ValueError, match="is not a"):
            scx.cells_of(text)


def test_cells_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are named, in that order, and no others."""
    found, _ = records(capsys, "--cells", "40+3,24+6", "--requests", "1", "--rounds", "1", "--variants", "plain")
    assert [record["workload"] for record in found] == ["1x40+3", "1x24+6"]


def test_a_longer_shape_is_made_for_long_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """Positions of a shape follow the grid, so that no cell is lost for a number in a configuration."""
    found, _ = records(capsys, "--prompts", "1500", "--outputs", "3", "--requests", "1", "--rounds", "1", "--variants",
                       "plain")  # fmt: skip
    assert [record["workload"] for record in found] == ["1x1500+3"]


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("tokens", [1, 2, 13, 100, 777])
def test_texts_of_exactly_so_many_tokens(tokens: int, llms: dict[str, LLM]) -> None:
    """Under a real tokenizer's rules; a seed is a text."""
    encode = llms["plain"].tokenizer.encode
    text = fixed_text(encode, tokens, 3)
    assert len(encode(text)) == tokens and fixed_text(encode, tokens, 3) == text
    assert tokens < 13 or fixed_text(encode, tokens, 4) != text


def test_a_tokenizer_without_such_a_text_is_an_error() -> None:
    """Nothing is called exact that is not."""
    with pytest.raises(ValueError, match="exactly 7 tokens"):
        fixed_text(lambda text: [0] * (2 * len(text.split())), 7, 0)


# ---------------------------------------------------------------- scores


def test_scores_are_the_models(llms: dict[str, LLM]) -> None:
    """The probabilities that generation tells, token by token, across chunks; the same with encoded layers; and slots
    are given back."""
    prompt = [5 + i * 7 % 400 for i in range(CHUNK_TOKENS + 40)]
    rule = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0)
    for llm in llms.values():
        done = llm.generate([prompt], rule, use_tqdm=False)[0].outputs[0]
        assert done.logprobs is not None
        llm.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)  # its steps close what has ended
        for _ in range(5):  # more often than there are slots
            found = score(llm, prompt + done.token_ids)
        assert len(found.logprobs) == len(prompt) + len(done.token_ids) - 1
        told = torch.tensor([entry.values[0] for entry in done.logprobs])
        torch.testing.assert_close(found.logprobs[-len(told) :], told, rtol=1e-4, atol=1e-4)
        assert found.likeliest[-len(told) :].all() and not found.likeliest.all()
    plain, mixed = (score(llm, prompt).logprobs for llm in llms.values())
    torch.testing.assert_close(mixed, plain, rtol=1e-3, atol=1e-3)
    assert not torch.equal(mixed, plain)


def test_passages_end_with_a_word_that_was_said() -> None:
    """Whole sentences, one passage a text; and the answer's first word counts."""
    long = "The old lamp " + "of brass and green glass " * 6 + "stood by the door."
    texts = [f"{long} Nobody knew who had bought the lamp. More follows here.", "Too short.", f"{long} It was unique."]
    assert scx_accuracy.clozes(texts, 9) == [scx_accuracy.Cloze(f"{long} Nobody knew who had bought the", "lamp")]
    assert len(scx_accuracy.clozes(texts * 3, 2)) == 2
    assert scx_accuracy.first_word("\n lamp, which") == "lamp" and scx_accuracy.first_word("4 lamps") == ""


def test_facts_compare_the_same_texts() -> None:
    """Differences are paired: one that is the same everywhere has no spread, whatever the texts' own spread is."""
    plain = scx_accuracy.Result(np.array([10.0, 40.0, 90.0]), np.array([10, 20, 30]), np.array([True, False, True]),
                                ["a", "b", "c"], 1.0)  # fmt: skip
    worse = scx_accuracy.Result(plain.nats + 0.1 * plain.tokens, plain.tokens, np.array([True, True, False]),
                                ["a", "d", "e"], 1.0)  # fmt: skip
    found = scx_accuracy.facts(worse, plain)
    assert found["bits_a_token_over_plain"] == pytest.approx(0.1 / np.log(2))
    assert found["bits_over_plain_interval"] == pytest.approx((0.1 / np.log(2),) * 2)
    low, high = found["perplexity_interval"]
    assert low < found["perplexity"] < high and found["perplexity"] == pytest.approx(np.exp(140 / 60 + 0.1))
    assert (found["cloze_gained"], found["cloze_lost"], found["same_answers"]) == (1, 1, pytest.approx(1 / 3))


def test_the_accuracy_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model: a record with every scheme; a corpus that is none is one line."""
    folder = models.tiny_llama_dir(tmp_path, 52)
    out = tmp_path / "record.json"
    flags = ["--model", str(folder), "--documents", "2", "--tokens", "64", "--passages", "3", "--dtype", "float32"]
    assert scx_accuracy.main([*flags, "--schemes", "perm", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["workload"] == "scx-accuracy-python-reference" and record["documents"] == 2
    assert abs(record["schemes"]["perm"]["bits_a_token_over_plain"]) < 1e-4 and record["passages"] == 3
    assert record["schemes"]["perm"]["same_answers"] == 1
    (tmp_path / "bad.jsonl").write_text("no json\n")
    assert scx_accuracy.main([*flags, "--corpus", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- lm-eval


def test_what_lm_eval_asks(llms: dict[str, LLM]) -> None:
    """A continuation's score is its tokens'; blanks go to the word behind them; a rolling score is that of the text
    after nothing, however long the text is."""
    llm = llms["plain"]
    encode = llm.tokenizer.encode
    context, answer = "the cat sat on", " the mat"
    total, greedy = scx_lm_eval.continuation(llm, context, answer)
    found = score(llm, encode(context + answer))
    count = len(encode(context + answer)) - len(encode(context))
    assert total == pytest.approx(float(found.logprobs[-count:].sum()))
    assert greedy == bool(found.likeliest[-count:].all())
    assert scx_lm_eval.continuation(llm, context + " ", "the mat") == (total, greedy)
    start = scx_lm_eval.continuation(llm, "", context)[0]
    assert scx_lm_eval.rolling(llm, context) == pytest.approx(start, abs=1e-4)
    rolled = scx_lm_eval.rolling(llm, "word " * 3000)
    assert len(encode("word " * 3000)) > llm.engine.scheduler.length_limit and rolled < 0
    (said,) = scx_lm_eval.generated(llm, [(context, {"until": ["\n"], "max_gen_toks": 3})])
    assert isinstance(said, str)


def test_the_engine_as_lm_evals_model(llms: dict[str, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three questions, each answered in the order of the requests, by an encoded engine as by the plain one."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", object, raising=False)
    asked = [("the cat sat on", " the mat"), ("one two", " three")]
    plain = llms["plain"]
    scores = [scx_lm_eval.continuation(plain, *pair)[0] for pair in asked]
    totals = [scx_lm_eval.rolling(plain, text) for text, _ in asked]
    rules = {"until": ["\n"], "max_gen_toks": 4}
    texts = scx_lm_eval.generated(plain, [(text, rules) for text, _ in asked])
    assert len(set(scores)) == len(set(totals)) == len(set(texts)) == 2
    for llm in llms.values():
        model = scx_lm_eval.as_lm_eval(llm)
        found = model.loglikelihood([SimpleNamespace(args=pair) for pair in asked])
        assert [total for total, _ in found] == pytest.approx(scores, rel=1e-3)
        rolled = model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text, _ in asked])
        assert rolled == pytest.approx(totals, rel=1e-3)
        assert model.generate_until([SimpleNamespace(args=(text, rules)) for text, _ in asked]) == texts


def test_lm_eval_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, and without a task, one line says what to do; the cloze task's files are lm-eval's."""
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        scx_lm_eval.as_lm_eval(None)  # type: ignore[arg-type]
    assert scx_lm_eval.main([]) == 2 and "no task" in capsys.readouterr().err
    long = "The old lamp " + "of brass and green glass " * 6 + "stood by the door."
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": f"{long} Nobody knew who had bought the lamp."}) + "\n")
    scx_lm_eval.write_task(corpus, 5, tmp_path)
    assert json.loads((tmp_path / "cloze.jsonl").read_text())["word"] == "lamp"
    assert "{{passage}}" in (tmp_path / "tessera_cloze.yaml").read_text()
    assert scx_lm_eval.main(["--task-folder", str(tmp_path / "made"), "--limit", "2"]) == 0
    lines = (tmp_path / "made" / "cloze.jsonl").read_text().splitlines()
    task = (tmp_path / "made" / "tessera_cloze_generated.yaml").read_text()
    assert len(lines) == 2 and str(tmp_path / "made" / "cloze.jsonl") in task and "max_gen_toks: 8," in task
    assert "'^\\s*([A-Za-z]+)'" in task and "{{word}}" in task
