"""`patch build` whole: reading, copies, both kinds, and that the same inputs give the same bytes."""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.core.errors import ConfigError, LoadError
from engine.patching import artefact as artefacts
from engine.patching.artefact_files import read
from engine.patching.build import Options, acceptable, add_arguments, build, in_priority, run
from engine.patching.corpus import Deduplicator, encode_corpus, every_nth, read_documents
from engine.patching.select import Choice
from engine.tokenization.hf import load_base_tokenizer
from tests.models import write_tiny_tokenizer

WORDS = ("server", "reads", "requests", "schedules", "tokens", "into", "steps", "maps", "pages", "when", "sequences",
         "grow", "and", "streams", "answers", "of", "the", "in", "a", "capital", "weather", "12", "7", "café", "你好")


def texts(seed: int, count: int, words: tuple[str, ...] = WORDS) -> list[str]:
    """Made-up documents in which phrases come back."""
    draw = random.Random(seed)
    phrases = [" ".join(draw.choices(words, k=draw.randint(2, 5))) for _ in range(25)]
    return [", ".join(draw.choices(phrases, k=draw.randint(8, 40))) + "." for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny byte-level base."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, two of them copies."""
    documents = texts(1, 60)
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", [*documents, documents[3], documents[5]])


@functools.cache
def sentencepiece_json() -> str:
    """A SentencePiece-style BPE as Llama 2's: no pre-tokenizer, byte fallback, added tokens before the pieces."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for training only
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=special, min_frequency=2)
    tokenizer.train_from_iterator(texts(3, 30, WORDS[:-1]), trainer)
    value = json.loads(tokenizer.to_str())
    value["pre_tokenizer"] = None
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(value)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "specials-outside"])
def any_base(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shapes of base; the last keeps its special tokens outside the model's vocabulary, as Llama 3 does."""
    if request.param == "byte-level":
        return base
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        (folder / "tokenizer.json").write_text(sentencepiece_json(), encoding="utf-8")
        return folder
    value = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    size = len(value["model"]["vocab"])
    for number, token in enumerate(value["added_tokens"]):
        del value["model"]["vocab"][token["content"]]
        token["id"] = size - len(value["added_tokens"]) + number
    by_id = sorted(value["model"]["vocab"], key=value["model"]["vocab"].get)
    value["model"]["vocab"] = {text: token for token, text in enumerate(by_id)}
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def options(base: Path, corpus: Path, **more: Any) -> Options:
    """Small builds without bars."""
    return Options(base=base, corpus=(corpus,), progress=False, **{"num_tokens": 60, **more})


def test_a_build_saves_tokens_and_its_vocabulary_is_sound(any_base: Path, corpus: Path, tmp_path: Path) -> None:
    """Kind patch, on every shape of base: as many removed as added, ids from the removed, V as before, every invariant
    of the reader, no dead n-gram, and the report's figures are of held-out documents too."""
    report = build(options(any_base, corpus, held_out_fraction=0.2), tmp_path / "out")
    artefact = read(tmp_path / "out", any_base)
    tokenizer, _ = load_base_tokenizer(any_base)
    assert artefact.vocab_size == tokenizer.vocab_size == artefact.base_vocab_size
    assert len(artefact.removed) == len(artefact.ngrams) == report["added"] == report["removed"] > 20
    assert sorted(artefact.ngram_ids) == sorted(artefact.removed)
    assert all(new == old for old, new in artefact.new_id_of.items())
    assert report["dead_ngrams"]["removed_piece"] == report["dead_ngrams"]["prefix_dominated"] == 0
    assert report["statistics"]["corpus"]["rho"] < report["statistics"]["held_out"]["rho"] + 0.05 < 1
    assert report["statistics"]["held_out"]["documents"] > 3
    assert artefact.meta["statistics"] == report["statistics"]
    assert report["rho_max"] == max(map(len, artefact.removed.values()))


def test_more_is_asked_than_can_be_found(base: Path, corpus: Path, tmp_path: Path) -> None:
    """The quota shrinks on both sides: never a removed token whose id nothing takes."""
    report = build(options(base, corpus, num_tokens=5000, held_out_fraction=0.0), tmp_path)
    artefact = read(tmp_path, base)
    assert report["added"] == len(artefact.removed) < 5000 and report["rho_max"] >= 2


def test_words_may_be_spanned_or_not(base: Path, corpus: Path, tmp_path: Path) -> None:
    """Across words saves more; within words no piece but the first begins with white space."""
    across = build(options(base, corpus), tmp_path / "across")
    within = build(options(base, corpus, within_word=True), tmp_path / "within")
    assert across["statistics"]["corpus"]["rho"] < within["statistics"]["corpus"]["rho"] < 1
    pieces = load_base_tokenizer(base)[0].table.pieces
    spanned = {folder: [ngram for ngram in read(tmp_path / folder, base).ngrams
                        if any(pieces[token][:1].isspace() for token in ngram[1:])] for folder in ("across", "within")}
    assert spanned["across"] and not spanned["within"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", artefacts.KINDS)
def test_the_same_inputs_give_the_same_bytes(base: Path, corpus: Path, tmp_path: Path, kind: str) -> None:
    """Whatever the hash seed and the number of threads."""
    code = ("import argparse\nfrom engine.patching.build import add_arguments, run\np = argparse.ArgumentParser()\n"
            "add_arguments(p)\nraise SystemExit(run(p.parse_args()))")
    found = []
    for seed, threads in (("0", "1"), ("4242", "2")):
        out = tmp_path / seed
        command = [sys.executable, "-c", code, "--base", base, "--corpus", corpus, "--kind", kind, "--num-tokens", "80",
                   "--out", out, "--no-progress"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
        found.append(files_of(out))
    assert found[0] == found[1]
    assert {"patch.json", "patch.safetensors", "report.json"} <= set(found[0])
    assert ("tokenizer.json" in found[0]) == (kind == "appended-merges")


def test_streaming_equals_in_memory(base: Path, corpus: Path, tmp_path: Path) -> None:
    """One document a batch or all in one: the same ids, copies and hashes, on disk as in memory."""
    tokenizer, _ = load_base_tokenizer(base)
    found = []
    for number, batch_chars in enumerate((1, 900, 1 << 24)):
        path = tmp_path / str(number)
        stream, aside = encode_corpus(read_documents([corpus]), tokenizer, path, Deduplicator(),
                                      (tmp_path / f"{number}-aside", every_nth(0.3)), keep_text=True,
                                      batch_chars=batch_chars)
        assert aside is not None
        found.append([(part.ids.tolist(), part.starts.tolist(), part.sha256,
                       list(itertools.chain.from_iterable(part.batches(50)))) for part in (stream, aside)])
        assert stream.exact_copies == 2
    assert found[0] == found[1] == found[2]
    whole = [text for part in found[0] for text in part[3]]
    assert sorted(whole) == sorted(set(read_documents([corpus])))
    for ids, starts, _, kept in found[0]:
        rows = tokenizer.encode_batch(kept, add_special_tokens=False)
        assert [ids[first:last] for first, last in itertools.pairwise(starts)] == rows


def test_near_copies_count_once_and_never_reach_the_held_out_text(base: Path) -> None:
    """A document with a few words changed is a copy, a different one and a short one are not, and order decides."""
    tokenizer, _ = load_base_tokenizer(base)
    documents = texts(8, 12)
    edited = [text.replace("capital", "province", 1).replace("weather", "climate", 1) for text in documents]
    rows = [np.array(ids, np.uint32) for ids in tokenizer.encode_batch([*documents, *edited, "a few words"] * 2)]
    seen = Deduplicator()
    flags = seen.near_copies(rows[:12]) + seen.near_copies(rows[12:25]) + seen.near_copies(rows[25:])
    assert not any(flags[:12]) and not flags[24] and sum(flags[12:24]) >= 11
    assert all(flags[25:37])


@functools.cache
def appended(base: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(base encoder, extended encoder, report) for a base; built once."""
    out = base / "appended"
    corpus = write_jsonl(base / "for-appended.jsonl", texts(2, 50))
    report = build(options(base, corpus, kind="appended-merges", num_tokens=150, max_n=5,
                           held_out_fraction=0.2), out)
    plain, longer = (load_base_tokenizer(folder)[0] for folder in (base, out))
    return plain, longer, report


def mixed_texts() -> st.SearchStrategy[str]:
    """Text like the corpus, and anything else."""
    corpus = "".join(texts(2, 3))
    inside = st.tuples(st.integers(0, len(corpus)), st.integers(0, 60)).map(lambda at: corpus[at[0]:at[0] + at[1]])
    return st.lists(st.one_of(inside, st.text(max_size=8), st.sampled_from(["<|eos|>", "</s>", " ", "\n\n"])),
                    max_size=6).map("".join)


def test_appended_merges_never_cost_more_than_the_base(any_base: Path) -> None:
    """For any text: at most the base's tokens, the same text back, and each new token joins base tokens in place:
    taking it apart gives the base's own encoding. Special tokens keep their ids."""
    plain, longer, report = appended(any_base)
    artefact = read(any_base / "appended", any_base)
    assert report["added"] == len(artefact.merges) > 25 and report["rho_max"] == 1
    assert longer.special_ids == plain.special_ids and longer.vocab_size == plain.vocab_size + report["added"]

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(mixed_texts())
    def check(text: str) -> None:
        before, after = plain.encode(text), longer.encode(text)
        assert len(after) <= len(before)
        assert [part for token in after for part in artefact.old_ids[token]] == before
        assert longer.decode(after) == plain.decode(before)

    check()


def test_appended_merges_save_what_was_counted_while_learning(any_base: Path) -> None:
    """The rules found on base ids do in the library what they did here: the totals agree to the token."""
    _, _, report = appended(any_base)
    stats = report["statistics"]["corpus"]
    assert stats["base_tokens"] - stats["patched_tokens"] == report["expected_saving_tokens"] > 0
    assert stats["max"] <= 1 and report["statistics"]["held_out"]["rho"] < 1


def test_appended_merges_respect_max_n(any_base: Path) -> None:
    """No new token stands for more base tokens than asked."""
    appended(any_base)
    lengths = {len(parts) for parts in read(any_base / "appended", any_base).ngrams}
    assert 2 <= min(lengths) < max(lengths) <= 5


def test_the_command_prints_its_table(base: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                      ) -> None:
    """Held-out files and named other domains appear in it, and the date that was asked for in the report."""
    other = write_jsonl(tmp_path / "o.jsonl", texts(77, 9, ("lorem", "ipsum", "dolor", "sit")))
    text = tmp_path / "h.txt"
    text.write_text("\n\n".join(texts(6, 7)), encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--base", base, "--corpus", corpus, "--out", tmp_path / "out", "--num-tokens", 40, "--held-out", text,
             "--documents", "paragraph", "--ood", f"latin={other}", "--ood", f"more={other}", "--date", "2026-01-02"]
    assert run(parser.parse_args([*map(str, flags), "--no-progress"])) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert all(f"\n{name} " in printed for name in ("corpus", "held_out", "latin", "more"))
    assert report["date"] == "2026-01-02" and report["statistics"]["held_out"]["documents"] == 7
    assert report["statistics"]["latin"]["rho"] > report["statistics"]["held_out"]["rho"]
    assert report["statistics"]["more"] == {"documents": 0}  # all of it was seen in the domain before


def test_longer_ngrams_come_first_and_text_rules_hold() -> None:
    """Priority hides nothing; halves of characters and bare numbers are refused, whole characters are not."""
    choices = [Choice((1, 2), 9), Choice((1, 2, 3), 5), Choice((4, 5), 3), Choice((6, 7, 8), 2)]
    assert in_priority(choices) == [(1, 2, 3), (6, 7, 8), (1, 2), (4, 5)]
    accept = acceptable([b" 1", b"2", b"\xc3", b"\xa9", b"x", b"\n"])
    assert accept((2, 3)) and accept((4, 2, 3)) and accept((1, 4)) and accept((5, 5))
    assert not accept((2, 4)) and not accept((3, 3)) and not accept((0, 1))


def test_documents_of_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain or .gz, by file, paragraph or line; folders in the order of their names; large files by paragraph."""
    text = "one\ntwo\n\n\nthree\n"
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"body": "x\\n\\ny"}\n\n{"body": "z"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    plain = [tmp_path / "b.txt"]
    assert list(read_documents(plain)) == list(read_documents(plain, "file")) == [text]
    assert list(read_documents(plain, "paragraph")) == ["one\ntwo\n", "three\n"]
    assert [line for line in read_documents(plain, "line") if line.strip()] == ["one\n", "two\n", "three\n"]
    assert list(read_documents([tmp_path], "file", "body")) == ["x\n\ny", "z", text]
    for limit in range(1, len(text) + 1):
        monkeypatch.setattr("engine.patching.corpus.ONE_DOCUMENT_BYTES", limit)
        assert list(read_documents(plain)) == ["one\ntwo\n", "three\n"]


def bad_corpora(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, what the error says)."""
    for name, content, said in (("a.jsonl", b'{"text": "x"}\n{"text', ":2: is not valid JSON"),
                                ("b.jsonl", b'{"body": "x"}\n', ":1: has no string 'text'"),
                                ("c.txt", b"caf\xe9", "is not UTF-8"), ("d.txt.gz", b"no gzip", "cannot be read")):
        path = folder / name
        path.write_bytes(content)
        yield path, said
    yield folder / "missing.txt", "no such file"


def test_bad_inputs_are_named(base: Path, corpus: Path, tmp_path: Path) -> None:
    """File, line and reason; options outside their range; a corpus without text; a base that is not BPE."""
    for path, said in bad_corpora(tmp_path):
        with pytest.raises(LoadError, match=said):
            build(options(base, path), tmp_path / "out")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no text"):
        build(options(base, tmp_path / "empty.txt"), tmp_path / "out")
    for wrong in ({"max_n": 1}, {"num_tokens": 0}, {"kind": "other"}, {"held_out_fraction": 1.0},
                  {"ood": {"corpus": (corpus,)}}):
        with pytest.raises(ConfigError, match=r"allowed|not one of|is taken"):
            options(base, corpus, **wrong)
    assert not (tmp_path / "out").exists()


def test_what_was_split_by_one_rule_is_split_by_another() -> None:
    """A corpus of which one tenth was set aside before (scripts.corpora) still gives its twentieth to the report."""
    texts = [f"document {index}" for index in range(4000)]
    before, here = every_nth(0.1), every_nth(0.05, "build")
    left = [text for text in texts if not before(text)]
    assert 0.03 < sum(map(here, left)) / len(left) < 0.07
    assert not any(map(every_nth(0.05), left))
