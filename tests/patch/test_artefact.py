"""The artefact on disk: what is written is read, and whatever does not hold is refused by its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.errors import LoadError, RequestError
from engine.patching import cli_inspect, errors
from engine.patching.artefact import Artefact, allocate, allocate_merges, to_arrays
from engine.patching.artefact_files import _rows, read, write
from engine.patching.base import BaseVocabulary, canonical_sha256, load_base
from engine.patching.invariants import check, check_rows, dead_ngrams
from engine.patching.place import ARRAYS_NAME, JSON_NAME, find
from engine.tokenization import load_tokenizer
from engine.tokenization.patched import PatchedTokenizer
from scripts import patch as command
from tests.patch.bases import SP_TEXT, decompositions, definition_of, small_patch


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], bases: dict[str, BaseVocabulary]) -> Artefact:
    """A patch of the SentencePiece-style base."""
    return small_patch(folders["pieces"], bases["pieces"], SP_TEXT, meta={"note": "é"})


def test_what_is_written_is_read(tmp_path: Path, made: Artefact, folders: dict[str, Path]) -> None:
    """Both kinds come back equal, from a folder or its patch/ subfolder; two writings have the same bytes."""
    check(made, load_base(folders["pieces"]))
    write(made, tmp_path / "model" / "patch")
    write(made, tmp_path / "again")
    place = find(tmp_path / "model")
    assert place == tmp_path / "model" / "patch"
    assert read(place, folders["pieces"]) == made
    for name in (JSON_NAME, ARRAYS_NAME):
        assert (place / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert read(tmp_path / "model", folders["pieces"]) == made
    tokenizer = load_tokenizer(folders["pieces"], tmp_path / "model")
    assert isinstance(tokenizer, PatchedTokenizer) and tokenizer.artefact == made
    assert find(tmp_path) is None


def test_the_hash_names_the_ids_and_not_the_notes(made: Artefact) -> None:
    """meta may be added to (statistics); an id, a priority or the base may not change unnoticed."""
    assert replace(made, meta={}).sha256 == made.sha256
    swapped = (made.ngrams[1], made.ngrams[0], *made.ngrams[2:])
    others = [replace(made, ngrams=swapped), replace(made, base_sha256="0" * 64), replace(made, kind="x"),
              replace(made, ngram_ids=made.ngram_ids[::-1])]
    assert len({made.sha256, *(other.sha256 for other in others)}) == 5


def test_our_own_ids_leave_kept_tokens_where_they_are(made: Artefact, bases: dict[str, BaseVocabulary]) -> None:
    """n-grams take removed ids in ascending order, then new ones at the end; too few n-grams are refused."""
    assert all(old == new for old, new in made.new_id_of.items())
    assert set(made.removed) == set(made.ngram_ids[: len(made.removed)])
    assert made.ngram_ids[len(made.removed)] == made.base_vocab_size
    with pytest.raises(errors.IdsNotContiguous, match="remove 1 at most"):
        allocate(bases["pieces"], made.removed, made.ngrams[:1])


def _json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(place: Path) -> None:
        value = json.loads((place / JSON_NAME).read_text("utf-8"))
        change(value)
        (place / JSON_NAME).write_text(json.dumps(value), "utf-8")
    return apply


def _arrays(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda place: (place / ARRAYS_NAME).write_bytes(change((place / ARRAYS_NAME).read_bytes()))


@pytest.mark.parametrize(("damage", "error"), [
    (lambda place: (place / JSON_NAME).unlink(), errors.MissingFile),
    (lambda place: (place / ARRAYS_NAME).unlink(), errors.MissingFile),
    (lambda place: (place / JSON_NAME).write_text("{"), errors.MalformedFile),
    (lambda place: (place / JSON_NAME).write_text("[" * 100_000), errors.MalformedFile),
    (lambda place: (place / JSON_NAME).write_text("[]"), errors.MalformedFile),
    (_json(lambda value: value.update(format="other")), errors.MalformedFile),
    (_json(lambda value: value.update(version=2)), errors.UnknownVersion),
    (_json(lambda value: value.update(kind="appended")), errors.UnknownVersion),
    (_json(lambda value: value.pop("base")), errors.MalformedFile),
    (_json(lambda value: value["base"].update(vocab_size=10**12)), errors.MalformedFile),
    (_json(lambda value: value["base"].update(vocab_size=3)), errors.MalformedFile),
    (_json(lambda value: value["base"].update(sha256="0" * 64)), errors.BaseMismatch),
    (_json(lambda value: value.update(vocab_size=value["vocab_size"] + 1)), errors.MalformedFile),
    (_json(lambda value: value.update(sha256="0" * 64)), errors.ArraysMismatch),
    (_json(lambda value: value.update(meta=None)), errors.MalformedFile),
    (_arrays(lambda raw: raw[:-4]), errors.TruncatedFile),
    (_arrays(lambda raw: raw + b"\0"), errors.TruncatedFile),
    (_arrays(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), errors.ArraysMismatch),
])  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path: Path, made: Artefact, folders: dict[str, Path],
                                           damage: Callable[[Path], object], error: type[LoadError]) -> None:
    """Missing, cut, changed or foreign files: one line, the right class."""
    write(made, tmp_path)
    damage(tmp_path)
    with pytest.raises(error) as caught:
        read(tmp_path, folders["pieces"])
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 8, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}" * 40,
                                     (2).to_bytes(8, "little") + b"{}"])
def test_arrays_with_a_matching_hash_may_still_be_garbage(tmp_path: Path, made: Artefact, garbage: bytes) -> None:
    """An attacker can write any hash: huge headers and absent arrays are refused all the same."""
    write(made, tmp_path)
    (tmp_path / ARRAYS_NAME).write_bytes(garbage)
    promised = {"bytes": len(garbage), "sha256": hashlib.sha256(garbage).hexdigest()}
    _json(lambda value: value["arrays"].update(promised))(tmp_path)
    with pytest.raises(errors.MalformedFile):
        read(tmp_path)


def test_offsets_that_wrap_are_refused(made: Artefact) -> None:
    """The difference of -2 and 2^31 - 1 is positive in 32 bits; such rows copied all parts again and again."""
    arrays = dict(to_arrays(made))
    arrays["ngram_offsets"] = np.array([0, *[5, 2**31 - 1, -2] * 3, arrays["ngram_parts"].size], "<i4")
    with pytest.raises(ValueError, match="ngram_offsets do not run"):
        _rows("ngram", arrays)


def _broken(made: Artefact, base: BaseVocabulary) -> list[tuple[type[errors.ArtefactError], Artefact]]:
    """(what must be raised, an artefact in which just that is wrong)."""
    removed, first = dict(made.removed), min(made.removed)
    second, *_ = sorted(set(removed) - {first})
    kept = dict(made.new_id_of)
    a, b, *_ = sorted(token for token in kept if token > 300)
    special = base.ids["</s>"]
    ngram_ids, old_ids = list(made.ngram_ids), list(made.old_ids)
    old_ids[ngram_ids[0]] = (a, b, a)

    def with_removed(parts: tuple[int, ...], token: int = first) -> Artefact:
        return replace(made, removed=removed | {token: parts})

    def with_ngram(pieces: tuple[int, ...], at: int = 0) -> Artefact:
        ngrams, old = list(made.ngrams), list(made.old_ids)
        ngrams[at] = old[made.ngram_ids[at]] = pieces
        return replace(made, ngrams=tuple(ngrams), old_ids=tuple(old))

    moved_converter = list(made.old_ids)
    moved_converter[a] = (b,)
    return [
        (errors.BaseMismatch, replace(made, base_sha256="f" * 64)),
        (errors.BaseMismatch, replace(made, base_vocab_size=made.base_vocab_size + 1)),
        (errors.IdOutOfRange, with_ngram((a, made.base_vocab_size))),
        (errors.IdOutOfRange, with_removed((a, -1))),
        (errors.IdOutOfRange, replace(made, ngram_ids=(made.vocab_size, *made.ngram_ids[1:]))),
        (errors.IdCollision, replace(made, ngram_ids=(a, *made.ngram_ids[1:]))),
        (errors.IdCollision, replace(made, new_id_of=kept | {a: b})),
        (errors.IdsNotContiguous, replace(made, old_ids=(*made.old_ids, (a,)))),
        (errors.KeptTokenUnmapped, replace(made, removed={t: p for t, p in removed.items() if t != first})),
        (errors.ConverterMismatch, replace(made, old_ids=tuple(moved_converter))),
        (errors.RemovedPart, with_removed((second, a))),
        (errors.CyclicDecomposition, with_removed((first, a))),
        (errors.CyclicDecomposition, replace(made, removed=removed | {first: (second, a), second: (a, first)})),
        (errors.DecompositionTooShort, with_removed((a,))),
        (errors.DecompositionText, with_removed((a, a, a, a))),
        (errors.SpecialRemoved, with_removed((special, a))),
        (errors.SpecialInNgram, with_ngram((a, special))),
        (errors.NgramTooShort, with_ngram((a,))),
        (errors.DuplicateNgram, with_ngram(made.ngrams[1])),
        (errors.NgramText, replace(made, old_ids=tuple(old_ids))),
        (errors.MalformedFile, replace(made, ngram_ids=made.ngram_ids[:-1])),
        (errors.BadMerge, replace(made, merges=((a, b),))),
    ]


def test_every_invariant_has_its_error(tmp_path: Path, made: Artefact, bases: dict[str, BaseVocabulary]) -> None:
    """Each condition broken alone raises its own class, from memory and from a file that says so consistently."""
    for number, (error, broken) in enumerate(_broken(made, bases["pieces"])):
        with pytest.raises(errors.ArtefactError) as caught:
            check(broken, bases["pieces"])
        assert type(caught.value) is error, number
        if broken.base_vocab_size == made.base_vocab_size and error is not errors.IdCollision:
            write(broken, tmp_path)
            with pytest.raises(errors.ArtefactError) as caught:
                read(tmp_path, base=bases["pieces"])
            assert type(caught.value) is error, number


def test_a_base_with_a_hole_has_missing_pieces(made: Artefact, bases: dict[str, BaseVocabulary]) -> None:
    """An n-gram of an id that no base token has is refused."""
    base = bases["pieces"]
    gone = made.ngrams[0][0]
    strings = tuple(None if token == gone else text for token, text in enumerate(base.strings))
    with pytest.raises(errors.MissingPiece):
        check(made, replace(base, strings=strings))


def test_rows_must_be_as_many_as_ids(made: Artefact) -> None:
    """One row fewer or more in either matrix is refused."""
    check_rows(made, made.vocab_size, "embed_tokens")
    for rows in (made.vocab_size - 1, made.vocab_size + 1):
        with pytest.raises(errors.WrongRows, match=f"lm_head has {rows} rows"):
            check_rows(made, rows, "lm_head")


def test_dead_ngrams_are_reported_and_never_refused(folders: dict[str, Path], bases: dict[str, BaseVocabulary]) -> None:
    """A removed piece, or a prefix of higher priority: the n-gram keeps its id."""
    parts_of = decompositions(definition_of(folders["pieces"]))
    gone = max(parts_of)
    a, b, c = sorted(parts_of)[:3]
    made = allocate(bases["pieces"], {gone: parts_of[gone]}, [(a, b), (a, b, c), (a, gone), (b, c, a), (b, c)])
    check(made, bases["pieces"])
    dead = dead_ngrams(made.ngrams, made.removed)
    assert dead.removed_piece == (2,)
    assert dead.prefix_dominated == (1,)


def test_merges_that_cannot_be(bases: dict[str, BaseVocabulary]) -> None:
    """A merge of a later token, one that spells an existing token, and one that does not make its n-gram."""
    base = bases["bytes"]
    with pytest.raises(errors.BadMerge):
        allocate_merges(base, [(base.vocab_size, 5)])
    left, right = next((base.ids[text[:cut]], base.ids[text[cut:]]) for text in base.ids for cut in range(1, len(text))
                       if text[:cut] in base.ids and text[cut:] in base.ids)
    with pytest.raises(errors.BadMerge, match="already"):
        check(allocate_merges(base, [(left, right)]), base)
    with pytest.raises(errors.BadMerge):
        check(replace(allocate_merges(base, [(300, 301)]), merges=((301, 300),)), base)


def test_the_canonical_hash_is_of_the_vocabulary_and_not_of_the_file(folders: dict[str, Path]) -> None:
    """Legacy merges, key order, decoder and truncation change nothing; a merge, a special or a digit rule does."""
    definition = json.loads((folders["bytes"] / "tokenizer.json").read_text("utf-8"))
    known = canonical_sha256(definition)
    legacy = json.loads(json.dumps(definition))
    legacy["model"]["merges"] = [" ".join(pair) for pair in legacy["model"]["merges"]]
    legacy["truncation"] = {"max_length": 5}
    legacy["decoder"] = None
    legacy["model"]["vocab"] = dict(reversed(legacy["model"]["vocab"].items()))
    legacy["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [legacy["pre_tokenizer"]]}
    assert canonical_sha256(legacy) == known
    for change in (lambda d: d["model"]["merges"].reverse(), lambda d: d["added_tokens"].pop(),
                   lambda d: d["model"].update(ignore_merges=True),
                   lambda d: d["pre_tokenizer"].update(use_regex=False)):
        other = json.loads(json.dumps(definition))
        change(other)
        assert canonical_sha256(other) != known


@pytest.mark.parametrize("error", [LoadError("x is y"), RequestError("x is y"), OSError(28, "x is y")])
def test_what_a_user_can_mend_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                          error: Exception) -> None:
    """A full disk, a text that is no Unicode, a file that is none: status 2 and no traceback."""
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(cli_inspect, "run", fail)
    assert command.main(["inspect", "somewhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{type(error).__name__}: " in said and "x is y" in said
