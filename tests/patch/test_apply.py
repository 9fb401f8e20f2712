"""scripts.patch apply: a patched model folder that transformers and Tessera open, or nothing at all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.core.errors import ConfigError, LoadError
from engine.loading import open_weights, read_config
from engine.loading.safetensors_header import write_file
from engine.patching import apply, model_folder
from engine.patching.apply import apply_patch
from engine.patching.artefact import Artefact, allocate
from engine.patching.artefact_files import read, write
from engine.patching.base import load_base
from engine.patching.errors import BaseMismatch
from engine.tokenization import load_tokenizer
from scripts.patch import main as patch_command
from tests.models import TINY_VOCAB, tiny_llama_dir, tiny_qwen2_dir

REMOVED = (300, 301, 410, 511)
NGRAMS = ((10, 20), (30, 40, 50), (60, 61, 62, 63), (70, 71))


def permuted_artefact(base_vocab: int = TINY_VOCAB, seed: int = 3) -> Artefact:
    """As upstream numbers them: every kept token gets another id, the n-grams the last ones."""
    kept = [token for token in range(base_vocab) if token not in REMOVED]
    order = np.random.default_rng(seed).permutation(len(kept)).tolist()
    new_id_of = {kept[at]: new for new, at in enumerate(order)}
    old_ids = [(0,)] * len(kept) + list(NGRAMS)
    for old, new in new_id_of.items():
        old_ids[new] = (old,)
    return Artefact(
        base_sha256="0" * 64, base_vocab_size=base_vocab, kind="patch",
        removed={token: (4, 5) for token in REMOVED}, ngrams=NGRAMS, old_ids=tuple(old_ids), new_id_of=new_id_of,
        ngram_ids=tuple(range(len(kept), len(old_ids))), meta={},
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """float64 logits [len(ids), V] of transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("make", "options"), [
    (tiny_llama_dir, {}),
    (tiny_llama_dir, {"dtype": "bfloat16", "max_shard_size": "100KB"}),
    (tiny_qwen2_dir, {"dtype": "float16"}),
    (tiny_llama_dir, {"tie_word_embeddings": True}),
    (tiny_qwen2_dir, {"tie_word_embeddings": True, "dtype": "bfloat16", "max_shard_size": "100KB"}),
], ids=["llama", "llama-bf16-shards", "qwen2-f16", "llama-tied", "qwen2-tied-bf16-shards"])  # fmt: skip
def test_the_patched_model_says_the_same_about_kept_tokens(tmp_path: Path, make: Any, options: Any) -> None:
    """Same text in kept tokens -> the same logits at their new ids; an n-gram's logit, computed by transformers, is
    the first-heaviest mean of its tokens' logits (the head is linear). A tied model that re-tied would fail both."""
    base, artefact = make(tmp_path, **options), permuted_artefact()
    report = apply_patch(base, artefact, tmp_path / "out")
    assert report.tied_before == ("tie_word_embeddings" in options) and not report.tied_after

    text = [2, 17, 99, 250, 400]
    before = logits(base, text)
    after = logits(tmp_path / "out", [artefact.new_id_of[token] for token in text])
    kept = list(artefact.new_id_of)
    torch.testing.assert_close(after[:, [artefact.new_id_of[token] for token in kept]], before[:, kept])
    rounding = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 2e-1}[options.get("dtype", "float32")]
    for new, old in zip(artefact.ngram_ids, NGRAMS):
        weights = torch.tensor([2.0**-i for i in range(len(old))], dtype=torch.float64)
        wanted = before[:, list(old)] @ (weights / weights.sum())
        torch.testing.assert_close(after[:, new], wanted, rtol=0, atol=rounding * 8)

    spec, old_spec = read_config(tmp_path / "out"), read_config(base)
    assert (spec.vocab, spec.tie, spec.dtype) == (len(artefact.old_ids), False, old_spec.dtype)
    with open_weights(base) as source, open_weights(tmp_path / "out") as patched:
        assert set(patched.names()) == set(source.names()) | {"lm_head.weight"}
        for name in set(source.names()) - {"lm_head.weight", "model.embed_tokens.weight"}:
            assert bits(source.get(name)) == bits(patched.get(name)) and source.dtype(name) == patched.dtype(name)


def test_input_rows_weigh_the_last_token_most(tmp_path: Path) -> None:
    """The two sides of exp are mirror images; swapped, a model still loads and talks nonsense."""
    base = tiny_llama_dir(tmp_path)
    artefact = permuted_artefact()
    apply_patch(base, artefact, tmp_path / "out")
    with open_weights(base) as source, open_weights(tmp_path / "out") as patched:
        for name, weights in (("model.embed_tokens.weight", [1, 2, 4]), ("lm_head.weight", [4, 2, 1])):
            rows = source.get(name)[[30, 40, 50]]
            wanted = (rows * torch.tensor(weights)[:, None] / 7).sum(0)
            torch.testing.assert_close(patched.get(name)[artefact.ngram_ids[1]], wanted)


@pytest.mark.parametrize(("method", "tying", "tied", "side"), [
    ("mean", "auto", True, None), ("mean", "untie", False, None),
    ("exp", "input", True, "input"), ("exp", "output", True, "output"),
])  # fmt: skip
def test_a_tied_model_stays_tied_only_where_one_matrix_is_meant(
    tmp_path: Path, method: Any, tying: Any, tied: bool, side: str | None
) -> None:
    """mean has equal sides; exp must be told which one. The flag, the file and transformers agree."""
    base, artefact = tiny_llama_dir(tmp_path, tie_word_embeddings=True), permuted_artefact()
    report = apply_patch(base, artefact, tmp_path / "out", method=method, tying=tying)
    assert (report.tied_after, read_config(tmp_path / "out").tie) == (tied, tied)
    with open_weights(tmp_path / "out") as patched, open_weights(base) as source:
        assert ("lm_head.weight" in patched) is not tied
        made, rows = patched.get("model.embed_tokens.weight"), source.get("model.embed_tokens.weight")
        weights = {None: [1, 1], "input": [1, 2], "output": [2, 1]}[side]
        wanted = (rows[[10, 20]] * torch.tensor(weights)[:, None] / sum(weights)).sum(0)
        torch.testing.assert_close(made[artefact.ngram_ids[0]], wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_keep_tied_is_refused_for_two_matrices(tmp_path: Path) -> None:
    """There is nothing to keep, and dropping the head silently would lose it."""
    with pytest.raises(ConfigError, match="two matrices"):
        apply_patch(tiny_llama_dir(tmp_path), permuted_artefact(), tmp_path / "out", tying="input")


def test_padding_rows_are_dropped_and_missing_rows_refused(tmp_path: Path) -> None:
    """Models are padded beyond their vocabulary; a model with fewer rows than the patch's base is another model."""
    base = tiny_llama_dir(tmp_path)
    small = permuted_artefact(base_vocab=TINY_VOCAB - 20)
    small = dataclasses.replace(small, removed={300: (4, 5), 301: (4, 5), 410: (4, 5)})
    report = apply_patch(base, small, tmp_path / "out")
    assert (report.rows_before, report.rows_after) == (TINY_VOCAB, len(small.old_ids))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(small.old_ids)
    with pytest.raises(LoadError, match=r"shape \(512, 64\); the patch is for 600 base ids"):
        apply_patch(base, permuted_artefact(base_vocab=600), tmp_path / "out2")


# -------------------------------------------------------------------- ids


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_every_id_in_the_configs_is_mapped(tmp_path: Path) -> None:
    """A stale eos id never ends a text; a stale suppressed id forbids a random word."""
    base, artefact = tiny_llama_dir(tmp_path), permuted_artefact()
    edit(base / "config.json", bos_token_id=0, eos_token_id=[1, 3], pad_token_id=-1, num_hidden_layers=2)
    edit(base / "generation_config.json", eos_token_id=[1, 3], suppress_tokens=[5, 6], bad_words_ids=[[7, 8], [9]],
         forced_decoder_ids=[[1, 11]], sequence_bias=[[[12, 13], -2.5]], pad_token_id=9999, top_k=40)  # fmt: skip
    apply_patch(base, artefact, tmp_path / "out")
    new = artefact.new_id_of
    config = json.loads((tmp_path / "out/config.json").read_text())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (new[0], [new[1], new[3]])
    assert config["pad_token_id"] is None and config["num_hidden_layers"] == 2
    assert generation["suppress_tokens"] == [new[5], new[6]]
    assert generation["bad_words_ids"] == [[new[7], new[8]], [new[9]]]
    assert generation["forced_decoder_ids"] == [[1, new[11]]]
    assert generation["sequence_bias"] == [[[new[12], new[13]], -2.5]]
    assert generation["pad_token_id"] is None and generation["top_k"] == 40
    assert read_config(tmp_path / "out").eos_ids == (new[1], new[3])


@pytest.mark.parametrize(("file", "values", "said"), [
    ("config.json", {"eos_token_id": [1, 410]}, "config.json: eos_token_id: base id 410 was removed"),
    ("generation_config.json", {"suppress_tokens": [300]}, "suppress_tokens: base id 300 was removed"),
    ("generation_config.json", {"bad_words_ids": [[1, "x"]]}, "'x' is not a token id"),
    ("generation_config.json", {"pad_token_id": True}, "'True' is not a token id"),
    ("generation_config.json", {"forced_decoder_ids": [1]}, "not a list of pairs"),
])  # fmt: skip
def test_an_id_without_a_meaning_stops_it_by_name(tmp_path: Path, file: str, values: Any, said: str) -> None:
    """A removed token has no single new id. Nothing is left behind."""
    base = tiny_llama_dir(tmp_path)
    edit(base / file, **values)
    with pytest.raises(LoadError) as caught:
        apply_patch(base, permuted_artefact(), tmp_path / "out")
    assert said in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name]


# -------------------------------------------------------------------- files


def test_an_existing_folder_is_never_written_into(tmp_path: Path) -> None:
    """The model folder itself is one of them."""
    base = tiny_llama_dir(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        apply_patch(base, permuted_artefact(), base)


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the second shard: no folder with half a model, and no scratch folder."""
    base = tiny_llama_dir(tmp_path, max_shard_size="100KB")
    written: list[Path] = []

    def full_disk(path: Path, *rest: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write_file(path, *rest)

    monkeypatch.setattr(model_folder, "write_file", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        apply_patch(base, permuted_artefact(), tmp_path / "out")
    assert written and sorted(path.name for path in tmp_path.iterdir()) == [base.name]


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """16 tensors of 4 MiB: memory is the embedding's business, not the model's."""
    base = tiny_llama_dir(tmp_path)
    rows, width, others = TINY_VOCAB, 2048, 16
    tensors = [("model.embed_tokens.weight", "F32", (rows, width)),
               *((f"model.layers.{i}.x.weight", "F32", (rows, width)) for i in range(others)),
               ("lm_head.weight", "F32", (rows, width))]  # fmt: skip
    one = bytes(4 * rows * width)
    write_file(base / "model.safetensors", tensors, (one for _ in tensors))
    tracemalloc.start()
    try:
        apply_patch(base, permuted_artefact(), tmp_path / "out")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * len(one)  # the new matrix, and the widened block its rows come from
    assert (tmp_path / "out/model.safetensors").stat().st_size > 17 * len(one)


def test_two_shards_stay_two_shards_and_get_an_index(tmp_path: Path) -> None:
    """The head that untying adds is in the index; transformers would otherwise invent it."""
    base = tiny_llama_dir(tmp_path, tie_word_embeddings=True, max_shard_size="100KB")
    apply_patch(base, permuted_artefact(), tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == sorted(path.name for path in base.glob("*.safetensors")) and len(shards) > 1
    assert index["weight_map"]["lm_head.weight"] in shards
    assert index["metadata"]["total_size"] == sum(
        int(np.prod(open_weights(tmp_path / "out").shape(name))) * 4 for name in index["weight_map"]
    )


# -------------------------------------------------------------------- command line


def real_patch(base_folder: Path) -> Artefact:
    """A small patch of the tiny tokenizer: removed tokens are re-spelled by their bytes' single characters."""
    base = load_base(base_folder)
    single = {text: token for text, token in base.ids.items() if len(text) == 1}
    long = [token for text, token in base.ids.items() if len(text) > 2 and token not in base.special_ids]
    removed = {token: [single[sign] for sign in base.strings[token] or ""] for token in sorted(long)[-6:]}
    kept = sorted(set(long) - set(removed))
    return allocate(base, removed, [(kept[i], kept[i + 1], kept[i + 2])[: 2 + i % 2] for i in range(8)])


def flags_of(*arguments: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    apply.add_arguments(parser)
    return parser.parse_args([*map(str, arguments), "--no-progress"])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes out is a model with its artefact inside, which belongs to the tokenizer beside it; more n-grams
    than removed tokens grow the vocabulary."""
    base = tiny_llama_dir(tmp_path, tie_word_embeddings=True)
    artefact = real_patch(base)
    write(artefact, tmp_path / "patch")
    assert apply.run(flags_of("--model", base, "--patch", tmp_path, "--out", tmp_path / "out")) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["rows_after"] == TINY_VOCAB + 2 and report["ngram_rows"] == 8 and "was tied" in printed.err
    assert report["extra_bytes"] == (TINY_VOCAB + 2) * 64 * 4
    inside = read(tmp_path / "out" / "patch", base_tokenizer_folder=tmp_path / "out")
    assert inside == artefact
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (TINY_VOCAB + 2, 64)


def test_another_models_patch_is_refused(tmp_path: Path) -> None:
    """Same size, same architecture, other tokenizer: only the hash tells."""
    base = tiny_llama_dir(tmp_path)
    write(dataclasses.replace(real_patch(base), base_sha256="0" * 64), tmp_path / "patch")
    with pytest.raises(BaseMismatch):
        apply.run(flags_of("--model", base, "--patch", tmp_path / "patch", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_patched_model_is_not_patched_again(tmp_path: Path) -> None:
    """Its tokenizer's hash is the base's, but its ids are not: the second patch would shuffle its rows."""
    base = tiny_llama_dir(tmp_path)
    write(real_patch(base), tmp_path / "patch")
    apply.run(flags_of("--model", base, "--patch", tmp_path / "patch", "--out", tmp_path / "out"))
    with pytest.raises(LoadError, match="is patched already"):
        apply.run(flags_of("--model", tmp_path / "out", "--patch", tmp_path / "patch", "--out", tmp_path / "again"))


def test_flags() -> None:
    """The two ways to treat a tied model exclude each other."""
    args = flags_of("--model", "m", "--patch", "p", "--out", "o")
    assert (args.method, args.untie, args.keep_tied) == ("exp", False, None)
    with pytest.raises(SystemExit):
        flags_of("--model", "m", "--patch", "p", "--out", "o", "--untie", "--keep-tied", "input")


def test_appended_merges_become_rows_behind_the_others(tmp_path: Path) -> None:
    """The second kind: no id moves, each merge is a new last row, and the folder encodes and loads."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "pages and steps, pages and slots, requests and pages " * 30}) + "\n")
    base, vocabulary = tiny_llama_dir(tmp_path), tmp_path / "vocabulary"
    assert patch_command(["build", "--kind", "appended-merges", "--base", str(base), "--corpus", str(texts),
                          "--num-tokens", "4", "--out", str(vocabulary), "--keep-copies", "--no-progress"]) == 0
    artefact = read(vocabulary, base_tokenizer_folder=base)
    report = apply_patch(base, artefact, tmp_path / "out")
    assert report.rows_after == report.rows_before + 4 == artefact.vocab_size
    old, new = logits(base, [10, 20, 30]), logits(tmp_path / "out", [10, 20, 30])
    assert torch.equal(old, new[:, : report.rows_before])
    text = "requests and pages"
    assert len(load_tokenizer(tmp_path / "out").encode(text)) < len(load_tokenizer(base).encode(text))
