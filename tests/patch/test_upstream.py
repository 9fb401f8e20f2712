"""Upstream's pickles: ids and order as they are there; anything that is not data is refused and never executed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from engine.patching import errors, upstream
from engine.patching.artefact import Artefact
from engine.patching.base import BaseVocabulary, load_base
from engine.patching.upstream import KNOWN_NAMES, import_upstream, read_pickle, recover_base
from tests.patch.bases import SP_TEXT, pickled, small_patch


def _names(base: BaseVocabulary, ids: tuple[int, ...]) -> list[Any]:
    return [base.strings[token] for token in ids]


def _save(folder: Path, artefact: Artefact, base: BaseVocabulary, change: Any = None) -> Path:
    """An upstream directory whose new ids run backwards, so that none is where it was."""
    top = artefact.vocab_size - 1
    data: dict[str, Any] = {
        upstream.REMOVED: {base.strings[token]: _names(base, parts) for token, parts in artefact.removed.items()},
        upstream.NGRAMS: {tuple(_names(base, pieces)): 7 for pieces in artefact.ngrams},
        upstream.CONVERTER: {base.strings[old]: {"old_indices": old, "new_index": top - new}
                             for old, new in artefact.new_id_of.items()}
        | {tuple(_names(base, pieces)): {"old_indices": list(pieces), "new_index": top - new}
           for pieces, new in zip(artefact.ngrams, artefact.ngram_ids, strict=True)},
    }  # fmt: skip
    if change is not None:
        change(data)
    for name, value in data.items():
        (folder / name).write_bytes(pickled(value))
    return folder


@pytest.fixture(scope="module")
def base(bases: dict[str, BaseVocabulary]) -> BaseVocabulary:
    """The SentencePiece-style base."""
    return bases["pieces"]


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], base: BaseVocabulary) -> Artefact:
    """What is saved as upstream would."""
    return small_patch(folders["pieces"], base, SP_TEXT)


def test_ids_and_priority_are_kept_exactly(tmp_path: Path, made: Artefact, base: BaseVocabulary) -> None:
    """Nothing is renumbered or sorted; tensors' files are never opened, whatever is in them."""
    _save(tmp_path, made, base)
    for name in ("embedding_input_exp_emb.pkl", "embedding_output_mean_emb.pkl"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    found = import_upstream(tmp_path, base)
    top = made.vocab_size - 1
    assert found.ngrams == made.ngrams
    assert found.ngram_ids == tuple(top - new for new in made.ngram_ids)
    assert found.new_id_of == {old: top - new for old, new in made.new_id_of.items()}
    assert found.old_ids == made.old_ids[::-1]
    assert found.removed == made.removed
    assert found.meta["add_bos"] is False


def _drop_entry(data: dict[str, Any]) -> None:
    data[upstream.CONVERTER].pop(next(iter(data[upstream.NGRAMS])))


def _collide(data: dict[str, Any]) -> None:
    first, second, *_ = data[upstream.CONVERTER].values()
    first["new_index"] = second["new_index"]


def _cycle(data: dict[str, Any]) -> None:
    token, *_ = data[upstream.REMOVED]
    data[upstream.REMOVED][token] = [token, "e"]


def _unknown_piece(data: dict[str, Any]) -> None:
    data[upstream.NGRAMS][("nowhere", "e")] = 1


@pytest.mark.parametrize(("change", "error"), [
    (_drop_entry, errors.MalformedUpstream), (_collide, errors.IdCollision), (_cycle, errors.CyclicDecomposition),
    (_unknown_piece, errors.MissingPiece),
    (lambda data: data.update({upstream.CONVERTER: []}), errors.MalformedUpstream),
    (lambda data: next(iter(data[upstream.CONVERTER].values())).update(new_index=10**9), errors.IdsNotContiguous),
    (lambda data: next(iter(data[upstream.CONVERTER].values())).update(old_indices="x"), errors.MalformedUpstream),
    (lambda data: data.pop(upstream.REMOVED), errors.MissingFile),
])  # fmt: skip
def test_directories_that_do_not_fit_are_refused_by_name(tmp_path: Path, made: Artefact, base: BaseVocabulary,
                                                         change: Any, error: type[Exception]) -> None:
    """Id collisions, cycles, unknown pieces, missing entries and files."""
    with pytest.raises(error):
        import_upstream(_save(tmp_path, made, base, change), base)


def _shared_lists() -> bytes:
    """Lists that each hold the one before twice: written out, 2^60 characters."""
    rounds = (b"0]q" + bytes([n]) + b"(" + (b"h" + bytes([n - 1])) * 2 + b"e" for n in range(1, 61))
    return b"\x80\x04]q\x00" + b"".join(rounds)


_LISTS = {"shared": _shared_lists(), "deep": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("shape", _LISTS)
@pytest.mark.parametrize("where", ["part", "class", "converter"])
def test_nested_lists_are_not_written_into_an_error(tmp_path: Path, made: Artefact, base: BaseVocabulary, shape: str,
                                                    where: str) -> None:
    """A pickle of 400 bytes took exponential time, a deep one ended in RecursionError: only the type is told."""
    _save(tmp_path, made, base)
    nested = _LISTS[shape][2:]
    head = b"\x80\x04"
    if where == "part":
        (tmp_path / upstream.REMOVED).write_bytes(head + b"}\x8c\x01e]" + nested + b"as.")
    elif where == "class":
        (tmp_path / upstream.REMOVED).write_bytes(head + nested + b"\x8c\x01x\x93.")
    else:
        (tmp_path / upstream.CONVERTER).write_bytes(head + b"}\x8c\x01e}\x8c\x0bold_indices" + nested + b"ss.")
    with pytest.raises(errors.ArtefactError) as found:
        import_upstream(tmp_path, base)
    assert len(str(found.value)) < 500


def test_one_list_named_by_many_tokens_is_counted_before_it_is_copied(tmp_path: Path, made: Artefact,
                                                                     base: BaseVocabulary) -> None:
    """20,000 tokens times one list of 1,000 parts are 20 million parts in a small file."""
    _save(tmp_path, made, base)
    keys = b"".join(b"M" + struct.pack("<H", n) + b"h\x00s" for n in range(20_000))
    shared = b"]q\x00(" + b"\x8c\x01e" * 1_000 + b"e0"
    (tmp_path / upstream.REMOVED).write_bytes(b"\x80\x04" + shared + b"}" + keys + b".")
    with pytest.raises(errors.PickleTooLarge, match="parts together"):
        import_upstream(tmp_path, base)


_DEEP = 200_000
HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch OWNED'\ntR.",
    "os.system, protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch OWNED\x85R.",
    "builtins.eval": b"\x80\x04cbuiltins\neval\n\x8c\x011\x85R.",
    "builtins.getattr": b"\x80\x04cbuiltins\ngetattr\n.",
    "torch nested load": b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93B\x00\x00\x00\x00\x85R.",
    "a known class called": b"\x80\x04ctokenizers\nTokenizer\n)R.",
    "a name in two parts": b"\x80\x04\x8c\x0atokenizers\x8c\x10Tokenizer.__init_\x93.",
    "INST": b"(S'touch OWNED'\nios\nsystem\n.", "OBJ": b"(cos\nsystem\nS'touch OWNED'\no.",
    "EXT1": b"\x80\x04\x82\x01.", "PERSID": b"Pabc\n.", "BINPERSID": b"K\x01Q.",
    "BUILD on a dict": b"\x80\x04}}b.", "NEWOBJ of a number": b"\x80\x04K\x01)\x81.",
    "huge memo": b"\x80\x04]r\xff\xff\xff\x7f.", "memo not there": b"\x80\x04j\xff\xff\xff\x7f.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "huge integer": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "huge long4": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "decimal bomb": b"L" + b"9" * 100_000 + b"L\n.",
    "nested tuple as a key": b"\x80\x04})" + b"\x85" * _DEEP + b"K\x01s.",
    "a list as a key": b"\x80\x04}]K\x01s.", "empty": b"", "no end": b"\x80\x04}", "nothing left": b"\x80\x04.",
    "two left": b"\x80\x04}}.", "a mark left": b"\x80\x04(}.", "no mark": b"\x80\x04}u.",
    "half a pair": b"\x80\x04}(K\x01u.",
    "append to a dict": b"\x80\x04}K\x01a.", "cut text": b"\x80\x04X\x10\x00\x00\x00ab.", "no pickle": b"\xff\xfe\x00",
    "invalid text": b"\x80\x04\x8c\x02\xff\xff.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Code, foreign names, sizes that only reserve memory, broken stacks: refused, and nothing ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(HOSTILE[name])
    for names in (frozenset[tuple[str, str]](), KNOWN_NAMES):
        with pytest.raises(errors.UnsafePickle) as caught:
            read_pickle(tmp_path / "x.pkl", names)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "OWNED").exists()


def test_deep_and_wide_bombs_cost_what_their_bytes_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesting by lists is bounded by the stack; a structure that only looks exponential stays as small as it is;
    one that contains itself has the wrong type."""
    path = tmp_path / upstream.REMOVED
    path.write_bytes(b"\x80\x04" + b"]" * _DEEP + b"a" * (_DEEP - 1) + b".")
    with pytest.raises(errors.PickleTooLarge):
        read_pickle(path)
    path.write_bytes(b"\x80\x04]" + b"\x94](" + b"h\x00" * 2 + b"e" + b"".join(
        b"\x94](" + (b"h" + bytes([level])) * 10 + b"e" for level in range(1, 200)) + b"\x94.")
    with pytest.raises(errors.UnsafePickle):  # lists are left under the last one
        read_pickle(path)
    path.write_bytes(b"\x80\x04]\x94h\x00a.")
    value = read_pickle(path)
    assert value[0] is value
    monkeypatch.setattr(upstream, "MAX_OPCODES", 3)
    with pytest.raises(errors.PickleTooLarge):
        read_pickle(path)
    monkeypatch.setattr(upstream, "MAX_FILE_BYTES", 3)
    with pytest.raises(errors.PickleTooLarge):
        read_pickle(path)


def test_an_object_of_a_known_class_is_an_inert_record(tmp_path: Path, folders: dict[str, Path],
                                                       base: BaseVocabulary) -> None:
    """The pickled tokenizer becomes a tokenizer.json again, with the names of its special tokens."""
    raw = (folders["pieces"] / "tokenizer.json").read_bytes()
    token = b"ctokenizers\nAddedToken\n)\x81" + pickled({"content": "<s>"})[2:-1] + b"b"
    backend = b"ctokenizers\nTokenizer\n)\x81" + pickled(raw)[2:-1] + b"b"
    live = (b"ctransformers.tokenization_utils_fast\nPreTrainedTokenizerFast\n)\x81}("
            + pickled("_tokenizer")[2:-1] + backend + pickled("init_kwargs")[2:-1] + b"}("
            + pickled("bos_token")[2:-1] + token + pickled("eos_token")[2:-1] + pickled("</s>")[2:-1] + b"uub")
    whole = b"\x80\x04}(" + pickled("existing_tokenizer")[2:-1] + live + b"u."
    (tmp_path / upstream.TOKENIZER).write_bytes(whole)
    found = load_base(recover_base(tmp_path, tmp_path / "out"))
    assert found.sha256 == base.sha256
    assert '"bos_token": "<s>"' in (tmp_path / "out" / "tokenizer_config.json").read_text()
    (tmp_path / upstream.TOKENIZER).write_bytes(pickled({"existing_tokenizer": 1}))
    with pytest.raises(errors.MalformedUpstream, match="--base"):
        recover_base(tmp_path, tmp_path / "out")
