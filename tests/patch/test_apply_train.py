"""scripts.patch train: what learns, what stays, that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.core.errors import ConfigError
from engine.loading import open_weights
from engine.patching import train_step
from engine.patching.train import END_OF_TEXT, TrainSettings, train
from engine.patching.train_data import TokenBlocks, token_blocks, windows
from engine.tokenization import load_tokenizer
from scripts.patch import main as patch_command
from tests.models import tiny_llama_dir

TEXTS = [f"The quick brown fox number {n} jumps over the lazy dog and reads requests, pages and steps. " * 3
         for n in range(24)]  # fmt: skip
SETTINGS = TrainSettings(context=16, batch=4, micro_batch=2, steps=8, learning_rate=1e-2, save_every=3)
LEARNING = ("model.embed_tokens.", "lm_head.", "model.layers.0.", "model.layers.2.")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 32 columns: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(tmp_path: Path, **options: Any) -> Path:
    return tiny_llama_dir(tmp_path, num_hidden_layers=3, hidden_size=32, **options)


def tensors_of(folder: Path) -> dict[str, bytes]:
    with open_weights(folder) as weights:
        return {name: weights.get(name).contiguous().view(torch.uint8).numpy().tobytes() for name in weights.names()}


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"tie_word_embeddings": True}])
def test_ends_learn_and_the_middle_stays_to_the_bit(tmp_path: Path, options: Any) -> None:
    """Embedding, head, first and last block; the released code leaves the first block frozen by a slip."""
    base = model_of(tmp_path, **options)
    report = train(base, TEXTS, tmp_path / "out", SETTINGS, held_out=TEXTS[:3])
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] == after[name]) is not name.startswith(LEARNING), name
    first, last = (row["bits_per_byte"] for row in report["evaluations"])
    assert last < 0.7 * first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(model.dtype) == f"torch.{options.get('dtype', 'float32')}"
    assert sorted(path.name for path in (tmp_path / "out/training").iterdir()) == ["loss.csv", "loss.png", "run.json"]
    assert (tmp_path / "out/training/loss.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    """Frozen weights and products in bfloat16, what learns in float32: small updates are not rounded away."""
    base = model_of(tmp_path)
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", learning_rate=1e-4, warmup=0)
    report = train(base, TEXTS, tmp_path / "out", settings, held_out=TEXTS[:2])
    first, last = (row["bits_per_byte"] for row in report["evaluations"])
    assert last < first
    with open_weights(base) as old, open_weights(tmp_path / "out") as new:
        change = (new.get("lm_head.weight") - old.get("lm_head.weight")).abs()
    assert 0 < change.max() < 2e-3  # 8 updates of 1e-4; what learns was not rounded to bfloat16 when it was loaded


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, lora_rank: int) -> None:
    """Killed before the first snapshot and between two: model, losses and evaluations are as if it never was."""
    if lora_rank:
        pytest.importorskip("peft")
    settings = dataclasses.replace(SETTINGS, lora_rank=lora_rank)
    base = model_of(tmp_path)
    train(base, TEXTS, tmp_path / "whole", settings, held_out=TEXTS[:2])
    for killed_after in (2, 5):
        train(base, TEXTS, tmp_path / "parts", settings, held_out=TEXTS[:2], stop=killed_after.__eq__)
        assert not (tmp_path / "parts").exists()
    train(base, TEXTS, tmp_path / "parts", settings, held_out=TEXTS[:2])
    assert tensors_of(tmp_path / "parts") == tensors_of(tmp_path / "whole") != tensors_of(base)
    for name in ("loss.csv", "run.json"):
        assert (tmp_path / "parts/training" / name).read_bytes() == (tmp_path / "whole/training" / name).read_bytes()
    assert [path.name for path in sorted((tmp_path / "parts.training").iterdir())] == ["step-00000006", "step-00000008"]


def test_all_blocks_are_the_whole_model(tmp_path: Path) -> None:
    """First and last blocks that meet in the middle leave nothing frozen, the last norm neither."""
    base = model_of(tmp_path)
    train(base, TEXTS, tmp_path / "out", dataclasses.replace(SETTINGS, first_blocks=2, last_blocks=1, save_every=0))
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert [name for name in before if before[name] == after[name]] == []
    assert not (tmp_path / "out.training").exists()  # no snapshots were asked for


def test_rows_may_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    """The first update of AdamW is as large as the rate: rows move by three times what a block's matrix does."""
    base = model_of(tmp_path)
    settings = dataclasses.replace(SETTINGS, row_rate=3.0, steps=1, warmup=0, learning_rate=1e-3, weight_decay=0.0)
    train(base, TEXTS, tmp_path / "out", settings)
    with open_weights(base) as old, open_weights(tmp_path / "out") as new:
        names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
        moved = [float((new.get(name) - old.get(name)).abs().max()) for name in names]
    assert moved == pytest.approx([3e-3, 3e-3, 1e-3], rel=0.01)


def test_every_block_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and nothing inside them, so that one compilation serves all."""
    model = train_step.load_model(model_of(tmp_path), "cpu")
    names = {module: name for name, module in model.named_modules()}
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(names[module]))
    train_step.compile_blocks(model)
    assert compiled == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_adapters_end_up_in_their_layers(tmp_path: Path) -> None:
    """The merged checkpoint says what the model with adapters said; norms of learning blocks stay."""
    pytest.importorskip("peft")
    base = model_of(tmp_path)
    train(base, TEXTS, tmp_path / "out", dataclasses.replace(SETTINGS, lora_rank=2))
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in before:
        learns = name.startswith(LEARNING) and "norm" not in name
        assert (before[name] == after[name]) is not learns, name
    with open_weights(base) as old, open_weights(tmp_path / "out") as new:
        change = new.get("model.layers.0.mlp.up_proj.weight") - old.get("model.layers.0.mlp.up_proj.weight")
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2


def test_snapshots_of_another_run_are_refused(tmp_path: Path) -> None:
    """Going on with another learning rate or text would be neither run."""
    base = model_of(tmp_path)
    train(base, TEXTS, tmp_path / "out", SETTINGS, stop=lambda step: step == 4)
    with pytest.raises(ConfigError, match=r"--learning-rate was 0.01, is 0.02"):
        train(base, TEXTS, tmp_path / "out", dataclasses.replace(SETTINGS, learning_rate=0.02))
    with pytest.raises(ConfigError, match="the tokens_sha256 is another one"):
        train(base, TEXTS[::-1], tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="the model is another one"):
        train(tiny_llama_dir(tmp_path, 1, num_hidden_layers=3, hidden_size=32), TEXTS, tmp_path / "out", SETTINGS)


@pytest.mark.parametrize(("change", "said"), [
    ({"micro_batch": 3}, "--batch 4 is not a multiple of --micro-batch 3"),
    ({"first_blocks": 2, "last_blocks": 2}, "the model has 3 blocks"),
    ({"context": 4096}, "less than one block of --context 4096"),
    ({"batch": 4096, "micro_batch": 1}, "less than one update of --batch 4096"),
    ({"dtype": "float8"}, "known: float32, bfloat16"),
    ({"learning_rate": float("nan")}, "must be above 0"),
])  # fmt: skip
def test_settings_that_cannot_be_honoured(tmp_path: Path, change: Any, said: str) -> None:
    """Each with value and limit, before anything is written."""
    with pytest.raises(ConfigError, match=said):
        train(model_of(tmp_path), TEXTS, tmp_path / "out", dataclasses.replace(SETTINGS, **change))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_every_block_is_seen_once_an_epoch() -> None:
    """The order follows from seed and step alone; epochs differ."""
    blocks = TokenBlocks(np.arange(20, dtype=np.int32).reshape(10, 2), 1, 20, 20, "")
    first, second = ([int(id_) for i in range(5) for id_ in blocks.at_step(epoch * 5 + i, 2, 7)[:, 0]]
                     for epoch in (0, 1))  # fmt: skip
    assert sorted(first) == sorted(second) == list(range(0, 20, 2)) and first != second


def test_blocks_are_the_documents_end_to_end(tmp_path: Path) -> None:
    """No special tokens appear but the separator that was asked for."""
    tokenizer = load_tokenizer(model_of(tmp_path))
    blocks = token_blocks(tokenizer, ["one two", "three"], 2, separator=1)
    wanted = [*tokenizer.encode("one two", False), 1, *tokenizer.encode("three", False), 1]
    assert blocks.ids.flatten().tolist() == wanted[: len(wanted) // 2 * 2] and blocks.utf8_bytes == 12


def test_the_models_own_end_of_text_may_separate(tmp_path: Path) -> None:
    """`--separator eos` is another id in each vocabulary; a model without one is told so."""
    base = model_of(tmp_path, eos_token_id=2)
    settings = dataclasses.replace(SETTINGS, separator=END_OF_TEXT, steps=1)
    own = train(base, TEXTS, tmp_path / "own", settings)
    given = train(base, TEXTS, tmp_path / "given", dataclasses.replace(settings, separator=2))
    assert load_tokenizer(base).eos_ids == (2,) and own["tokens_sha256"] == given["tokens_sha256"]


@pytest.mark.parametrize("context", [2, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 2, 3, 9, 40, 65])
def test_windows_score_every_token_once(length: int, context: int) -> None:
    """Bits per byte of a document must not depend on where windows are cut."""
    ids = list(range(length))
    scored = [token for window in windows(ids, context) for token in window.ids[window.first :]]
    assert scored == ids[1:]
    assert all(len(window.ids) <= context and window.first >= 1 for window in windows(ids, context))


def test_bits_per_byte_is_the_documents_own(tmp_path: Path) -> None:
    """One window: -log2 p(text | start) over its UTF-8 bytes, as computed by hand."""
    base = model_of(tmp_path)
    model = train_step.load_model(base, "cpu")
    ids = load_tokenizer(base).encode("The quick brown fox", False)
    loss = train_step.evaluate(model, [(ids, 19)], 64, 1, amp=False)
    with torch.no_grad():
        chances = model(torch.tensor([[1, *ids]])).logits[0].log_softmax(-1)
    by_hand = -sum(float(chances[at, token]) for at, token in enumerate(ids)) / np.log(2) / 19
    assert abs(loss.bits_per_byte - by_hand) < 1e-5


def test_documents_score_the_same_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of different lengths go through the model at once, filled up; each document keeps its own nats."""
    base = model_of(tmp_path)
    model = train_step.load_model(base, "cpu")
    documents = load_tokenizer(base).encode_batch([TEXTS[0], "a", TEXTS[1] * 3, TEXTS[2][:40]], False)
    apart = [train_step.document_nats(model, [ids], 16, 1, amp=False)[0] for ids in documents]
    monkeypatch.setitem(train_step.SCORED_TOKENS, "cpu", 16 * 5)
    assert train_step.document_nats(model, documents, 16, 1, amp=False) == pytest.approx(apart, rel=1e-5)
    whole = train_step.evaluate(model, [(ids, 1) for ids in documents], 16, 1, amp=False)
    assert whole.nats * whole.tokens == pytest.approx(sum(apart), rel=1e-5)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    """Linear, then half a cosine."""
    rates = [train_step.learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[10] and 0 < rates[-1] < 1e-3
    assert json.dumps(rates) == json.dumps(sorted(rates[:10]) + sorted(rates[10:], reverse=True))


def test_one_command_applies_and_trains(tmp_path: Path) -> None:
    """`train --patch` is `apply` and then `train`, also when it was interrupted in between."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    base, vocabulary = model_of(tmp_path), tmp_path / "vocabulary"
    assert patch_command(["build", "--base", str(base), "--corpus", str(texts), "--num-tokens", "8", "--out",
                          str(vocabulary), "--no-progress", "--keep-copies"]) == 0  # fmt: skip
    above = tmp_path / "above"
    shutil.copytree(vocabulary, above / "patch")
    common = ["--corpus", str(texts), "--context", "16", "--batch", "4", "--steps", "2", "--no-progress"]
    assert patch_command(["apply", "--model", str(base), "--patch", str(vocabulary), "--out",
                          str(tmp_path / "applied"), "--no-progress"]) == 0  # fmt: skip
    assert patch_command(["train", "--model", str(tmp_path / "applied"), "--out", str(tmp_path / "two"), *common]) == 0
    together = ["train", "--model", str(base), "--patch", str(above), "--out", str(tmp_path / "one"), *common]
    assert patch_command(together) == 0
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "kept")
    assert patch_command(together) == 0
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "one").encode(TEXTS[0]) != load_tokenizer(base).encode(TEXTS[0])
