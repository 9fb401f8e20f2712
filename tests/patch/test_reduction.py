"""Figures of rho: measured by verify, kept in the artefact, read back; and what cannot be used is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from engine.core.errors import ConfigError, LoadError
from engine.loading import resolve
from engine.patching.artefact_files import read, write
from engine.patching.base import BaseVocabulary
from engine.patching.reduction import load_reduction
from engine.tokenization import load_tokenizer
from scripts import patch as command
from scripts import plan
from tests.patch.bases import SP_TEXT, small_patch

TEXTS = [f"{text} {index}" for index, text in enumerate(SP_TEXT * 4)]


@pytest.fixture
def artefact(tmp_path: Path, folders: dict[str, Path], bases: dict[str, BaseVocabulary]) -> Path:
    """A small artefact without figures."""
    write(small_patch(folders["bytes"], bases["bytes"], SP_TEXT, meta={"note": "kept"}), tmp_path / "patch")
    return tmp_path / "patch"


def test_verify_measures_and_stores_both_sides(artefact: Path, folders: dict[str, Path], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """The ratio of sums of the texts and of what a model emitted, under the domain's name; the vocabulary stays the
    same one, and other facts of meta stay."""
    tokenizer = load_tokenizer(folders["bytes"], artefact)
    texts, emitted = tmp_path / "texts.jsonl", tmp_path / "emitted.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    outputs = [tokenizer.encode(text, False)[:-1] + list(tokenizer.special_ids)[:1] for text in TEXTS]
    emitted.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in outputs))
    before = read(artefact)
    flags = ["verify", str(artefact), "--base", str(folders["bytes"]), "--text", str(texts), "--emitted", str(emitted),
             "--domain", "ours"]
    assert command.main(flags) == 0 and read(artefact) == before  # shown, not stored
    assert command.main([*flags, "--store"]) == 0
    assert "side in:" in capsys.readouterr().out
    after = read(artefact)
    assert after.sha256 == before.sha256 and after.meta["note"] == "kept"
    found = load_reduction(None, artefact, "ours")
    base = [len(tokenizer.base.encode(text, add_special_tokens=False)) for text in TEXTS]  # type: ignore[attr-defined]
    patched = [len(tokenizer.encode(text, False)) for text in TEXTS]
    assert found.into is not None and found.out is not None and found.warning is None
    assert found.into.rho == sum(patched) / sum(base) < 1 and found.into.date is not None
    assert found.into.rho_max == max(map(len, after.removed.values()))
    spelled = [tokenizer.decode(ids, True) for ids in outputs]
    assert found.base_lengths == tuple(len(tokenizer.base.encode(text, add_special_tokens=False))  # type: ignore[attr-defined]
                                       for text in spelled)
    assert found.out.patched_tokens == sum(len(ids) - 1 for ids in outputs)


def test_a_base_is_found_by_any_of_its_names_or_missed_aloud(
        artefact: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """What is no folder is resolved as a model is; texts without any base are an error, not left unread."""
    monkeypatch.setattr(resolve, "resolve_model", lambda name, progress: {"a-model": folders["bytes"]}[name])
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ["verify", str(artefact), "--text", str(texts)]
    assert command.main([*flags, "--base", "a-model", "--speed"]) == 0
    said = capsys.readouterr().out
    assert "every invariant holds" in said and f"{len(TEXTS)} texts: 0 decode otherwise" in said and '"ratio"' in said
    assert command.main(["inspect", str(artefact), "--base", "a-model"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 12  # its n-grams are spelled out
    assert command.main(flags) == 2 and "give --base" in capsys.readouterr().err


def test_nothing_is_invented(artefact: Path) -> None:
    """An artefact without figures and no artefact: prior 1, no side, nothing to advertise; a domain that was asked for
    and is not there is refused, with those that are."""
    for place in (artefact, None):
        found = load_reduction(None, place)
        assert (found.into, found.out, found.prior, found.base_lengths) == (None, None, 1.0, ())
        assert found.demand().stats()["rho_out"] == 1.0
    with pytest.raises(LoadError, match="no figures of domain 'law'; it has: none"):
        load_reduction(None, artefact, "law")


@pytest.mark.parametrize(("setting", "words"), [
    ("0", "not a number in 0.01"), ("nan", "not a number in"), ("-1", "not a number in"), ("no-such-file", "neither"),
])  # fmt: skip
def test_bad_settings_are_named(setting: str, words: str) -> None:
    """A number outside its range, or a name that is no file."""
    with pytest.raises(ConfigError, match=words):
        load_reduction(setting, None)


@pytest.mark.parametrize(("content", "words"), [
    ({"output_base_tokens": [1, -2]}, "output_base_tokens"), ({"rho": "0.75"}, "rho '0.75'"), ({"rho": 500}, "rho 500"),
    ({"statistics": {"held_out": {"documents": 5}}}, "field base_tokens"),
])  # fmt: skip
def test_bad_files_are_named(content: dict[str, object], words: str, tmp_path: Path) -> None:
    """File and field."""
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=f"figures.json: .*{words}"):
        load_reduction(str(file), None)


def test_in_sample_figures_and_bare_numbers_warn(artefact: Path, tmp_path: Path) -> None:
    """They are taken, and what is wrong with them is said."""
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"statistics": {"corpus": SIDE, "held_out": {"documents": 0}}}))
    assert "flatter" in (load_reduction(str(file), artefact, "corpus").warning or "")
    assert load_reduction(str(file), artefact).into is None
    assert "without `provenance`" in (load_reduction(_write(tmp_path, {"rho": 0.8}), None).warning or "")
    assert load_reduction(_write(tmp_path, {"rho": 0.8, "provenance": "us"}), None).warning is None


SIDE = {"documents": 50, "base_tokens": 1000, "patched_tokens": 700, "se": 0.01, "phi": 1.0, "q50": 0.7, "q95": 0.8,
        "q99": 0.9, "rho_max": 3.0}  # fmt: skip


def test_figures_are_of_one_vocabulary(artefact: Path, tmp_path: Path) -> None:
    """A file of another vocabulary's figures is refused, one that does not say whose they are is warned about."""
    figures = {"statistics": {"held_out": SIDE}}
    own = read(artefact).sha256
    assert load_reduction(_write(tmp_path, figures | {"artefact_sha256": own}), artefact).warning is None
    assert "do not say" in (load_reduction(_write(tmp_path, figures), artefact).warning or "")
    with pytest.raises(LoadError, match="rho.json: its figures are of another vocabulary"):
        load_reduction(_write(tmp_path, figures | {"artefact_sha256": "0" * 64}), artefact)


@pytest.mark.parametrize("told", [1.0, 1e9])
def test_what_no_text_exceeds_is_the_artefacts_to_say(told: float, artefact: Path) -> None:
    """rho_max of texts is the most parts of a removed token; patch.json's notes are not hashed and may say anything."""
    made = read(artefact)
    write(dataclasses.replace(made, meta={"statistics": {"held_out": SIDE | {"rho_max": told}}}), artefact)
    found = load_reduction(None, artefact).into
    assert found is not None and found.rho_max == max(map(len, made.removed.values()))


@pytest.mark.parametrize("field", ["1e999", "9" * 400, "1e-320", "NaN"])
@pytest.mark.parametrize("name", ["base_tokens", "q99", "documents"])
def test_figures_that_no_text_has_are_refused_by_file(field: str, name: str, tmp_path: Path) -> None:
    """They ended the start with OverflowError or ValueError."""
    side = json.dumps(SIDE | {"q50": 1e-321, "q95": 1e-321, name: "?"}).replace('"?"', field)
    file = tmp_path / "figures.json"
    file.write_text('{"statistics": {"held_out": ' + side + "}}")
    try:
        assert load_reduction(str(file), None).into is None  # documents that are no integer: not measured
    except LoadError as error:
        assert "figures.json: statistics of 'held_out'" in str(error)


def _write(folder: Path, content: object) -> str:
    file = folder / "rho.json"
    file.write_text(json.dumps(content))
    return str(file)


CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
          "rms_norm_eps": 1e-5, "dtype": "float32"}  # fmt: skip


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    """plan --json of a folder without weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    capsys.readouterr()
    assert plan.main([str(folder), "--kv-page-bytes", "4096", "--pool-bytes", "1MiB", "--json", *flags]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_counts_as_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory never depends on rho; requests, contexts and Little's law do."""
    side = {"documents": 500, "base_tokens": 10**6, "patched_tokens": 8 * 10**5, "characters": 4 * 10**6, "se": 1e-4,
            "phi": 0.01, "q50": 0.8, "q95": 0.9, "q99": 1.0, "rho_max": 4.0}  # fmt: skip
    file = _write(tmp_path, {"statistics": {"d": side}, "statistics_out": {"d": side}})
    found: dict[str, dict[str, dict[str, float]]] = planned(  # type: ignore[assignment]
        tmp_path, capsys, "--token-reduction", file, "--domain", "d", "--arrival-rate", "2", "--token-s", "0.1",
        "--input-base-tokens", "100", "--output-base-tokens", "60", "--output-spread", "0",
        "--serve-base-tokens", "700")
    memory, context, requests = found["memory"], found["context"], found["requests"]
    assert memory["KV bytes of a token"] == 2 * 2 * 2 * 16 * 4 and memory["tokens of a page"] == 16
    assert memory["groups"] == 128 and memory["tokens of the pool"] == 2048
    assert memory["KV bytes of a character, patched"] == pytest.approx(512 * 0.2)
    assert context["base tokens, any text"] == 256 and context["base tokens, 99% of texts"] == 1024
    assert context["--max-model-len for 700 base tokens"] == 700
    assert 82 <= context["engine tokens of 100 base tokens, at the risk"] <= 84  # 80 + 3.09 sqrt(0.01 * 100) and se
    base, patched = requests["base"], requests["patched"]
    assert (base["rho in"], patched["rho in"]) == (1, 0.8)
    assert base["groups a request, at its end"] == 10 and patched["groups a request, at its end"] == 8
    assert base["requests at once, all at their end"] == 12 and patched["requests at once, all at their end"] == 16
    assert base["groups a request, on average"] == pytest.approx((100 + 30) / 16 + 0.5)
    assert base["requests at once, by Little's law"] == pytest.approx(2 * 60 * 0.1)
    assert 8 < base["requests at once, at the risk"] < patched["requests at once, at the risk"] <= 16
    assert found["warnings"] == []


def test_a_plan_without_a_pool_or_with_a_bad_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on standard error, status 2."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for flags, words in (([], "give --pool-bytes"), (["--pool-bytes", "8KiB"], "holds less than one page"),
                         (["--pool-bytes", "64MiB", "--max-model-len", "5000"], "exceeds the model's 1024"),
                         (["--device-bytes", "1e9"], "no *.safetensors"), (["--pool-bytes", "1GiB", "--risk", "0.7"],
                                                                          "not below 0.5")):  # fmt: skip
        assert plan.main([str(tmp_path), *flags]) == 2
        assert words in capsys.readouterr().err
    assert plan.main([str(tmp_path), "--pool-bytes", "1GiB"]) == 0
    assert "requests at once, at the risk" in capsys.readouterr().out
