"""Plain vocabularies: ids equal to transformers', bytes exact for every id, faults are one-line LoadErrors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.errors import LoadError, RequestError
from engine.tokenization import HfTokenizer, load_tokenizer
from engine.tokenization.byte_table import byte_of_char
from tests.models import TINY_VOCAB, write_tiny_tokenizer
from tests.text.conftest import REAL, of_transformers, real

TEXTS = (
    "Once upon a time",
    " leading and  double spaces ",
    "don't, we'll; 3.14159 and 1,000,000 in 2024-01-02",
    "Größe café naïve Ελλάδα Привет 你好世界 こんにちは 한국어",
    "🙂👩‍👩‍👧🏳️‍🌈 mixed\n\nlines\tand\r\ntabs",
    "def f(x):\n    return x ** 2  # squared\n",
    "e\u0301 decomposed \u1112\u1161\u11ab \ufb01 \u00a0 \u2581 \ufffd \x00 \x7f",
    "",
)


@pytest.mark.parametrize("name", REAL)
def test_ids_and_text_are_those_of_transformers(name: str) -> None:
    """encode (with and without special tokens) and decode agree with transformers on the same folder."""
    ours, theirs = real(name), of_transformers(name)
    for text in (*TEXTS, "".join(theirs.all_special_tokens) + "x"):
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids, text
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert set(theirs.all_special_ids) <= ours.special_ids


@pytest.mark.parametrize(
    ("name", "ids"),
    [("gpt2", [7454, 2402, 257, 640]), ("llama3", [12805, 5304, 264, 892]), ("qwen2_5", [12522, 5193, 264, 882])],
)
def test_published_ids(name: str, ids: list[int]) -> None:
    """The ids of a known sentence, independent of any library."""
    assert real(name).encode("Once upon a time", add_special_tokens=False) == ids


def test_smollm2_splits_every_digit_and_names_its_ends() -> None:
    """SmolLM2 cuts numbers into digits before anything else, so a space before one stays alone."""
    tokenizer = real("smollm2")
    digits = [tokenizer.encode(digit)[0] for digit in "0123456789"]
    assert [token for token in tokenizer.encode("12345") if token in digits] == [digits[int(d)] for d in "12345"]
    assert tokenizer.encode("  20") == [*tokenizer.encode("  "), digits[2], digits[0]]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.decode([1, 2]) == "" and tokenizer.decode([1], skip_special_tokens=False) == "<|im_start|>"


@pytest.mark.parametrize("name", REAL)
def test_the_byte_table_is_exact_for_every_id(name: str) -> None:
    """One id alone decodes to its table entry; specials have no bytes; no entry is longer than max_token_bytes."""
    tokenizer = real(name)
    table = tokenizer.table
    for token in range(tokenizer.vocab_size):
        text = table.piece(token).decode("utf-8", "replace")
        if table.strip and text.startswith(" "):
            text = text[1:]
        assert tokenizer.decode([token], skip_special_tokens=False) == text
        if token in tokenizer.special_ids:
            assert tokenizer.token_bytes(token) == b""
    assert max(map(len, table.pieces)) <= tokenizer.max_token_bytes <= 1024


@pytest.mark.parametrize("name", REAL)
def test_a_text_never_needs_fewer_tokens_than_its_bytes_say(name: str) -> None:
    """R23: bytes > n * max_token_bytes means more than n tokens, so the server may refuse before it encodes."""
    tokenizer = real(name)
    for text in (*TEXTS, " " * 4000, "\u2581" * 1000, "-" * 4000, "=" * 999, "的" * 500):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(text.encode()) <= len(ids) * tokenizer.max_token_bytes


def test_gpt2_alphabet_is_a_bijection() -> None:
    """256 characters for 256 bytes, none of them white space or a control character."""
    alphabet = byte_of_char()
    assert sorted(alphabet.values()) == list(range(256))
    assert all(char.isprintable() and not char.isspace() for char in alphabet)


def test_the_tiny_vocabulary(tiny: HfTokenizer) -> None:
    """What other tests rely on: size, ends, any text survives a round trip, unknown ids stand for nothing."""
    assert (tiny.vocab_size, tiny.bos_id, tiny.eos_ids) == (TINY_VOCAB, 0, (1,))
    for text in TEXTS:
        assert tiny.decode(tiny.encode(text)) == text
    assert tiny.decode([-1, 10_000_000, *tiny.encode("x")]) == "x"
    assert tiny.token_bytes(10_000_000) == tiny.token_bytes(-1) == b""


def test_ends_come_from_generation_config_before_config(tmp_path: Path) -> None:
    """The eos list of generation_config.json wins; without both files the tokenizer's own name counts."""
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5, "bos_token_id": 7}')
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (7, (5,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 1, 3, 99999999, "x"]}')
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (7, (3, 1))


def test_special_only_by_configuration(tmp_path: Path) -> None:
    """A token that only tokenizer_config.json calls special is skipped too, and no id is invented."""
    write_tiny_tokenizer(tmp_path)
    before = load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["unk_token"] = {"content": "e"}
    config["additional_special_tokens"] = ["<not in the vocabulary>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    after = load_tokenizer(tmp_path)
    assert after.special_ids - before.special_ids == set(before.encode("e"))
    assert after.vocab_size == before.vocab_size


def test_refusals_name_the_fix(tmp_path: Path, tiny: HfTokenizer) -> None:
    """A missing folder or file, a lone surrogate: typed errors that say what to do."""
    with pytest.raises(LoadError, match=r"give the folder with tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"needs tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(LoadError, match="convert it with transformers"):
        load_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        tiny.encode("a\ud83d")


@pytest.mark.parametrize(
    "decoder",
    [None, {"type": "WordPiece", "prefix": "##", "cleanup": True},
     {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
     {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"},
                                       {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}],
)  # fmt: skip
def test_a_decoder_that_streams_cannot_equal_is_refused(tmp_path: Path, decoder: object) -> None:
    """Only decoders whose byte table is exact are accepted."""
    write_tiny_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(LoadError, match="decoder"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_load_errors(tmp_path: Path, tiny_dir: Path) -> None:
    """Flipped and cut bytes in tokenizer.json and tokenizer_config.json: a tokenizer or a LoadError, nothing else."""
    rng = random.Random(5)
    refused = 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_tiny_tokenizer(tmp_path)
        whole = (tiny_dir / name).read_bytes()
        for _ in range(150):
            raw = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3))):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw
            (tmp_path / name).write_bytes(raw)
            try:
                load_tokenizer(tmp_path).encode("probe 1 2 3")
            except LoadError as error:
                refused += 1
                assert str(tmp_path) in str(error) and "\n" not in str(error)
    assert refused > 100


def test_neither_torch_nor_transformers_is_loaded(tiny_dir: Path) -> None:
    """The HTTP process stays small: a fresh interpreter encodes, renders and streams without either."""
    code = (
        "import sys; from engine.tokenization import load_tokenizer, Detokenizer\n"
        f"t = load_tokenizer({str(tiny_dir)!r}); ids = t.encode(t.render_chat([{{'role': 'user', 'content': 'hi'}}]))\n"
        "assert Detokenizer(t).push(ids).text; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
