"""A patched tokenizer: the merge rule against its definition, texts against the base, streams against the whole."""

from __future__ import annotations

import glob
import itertools
import json
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import LoadError, RequestError
from engine.patching.artefact import allocate, allocate_merges
from engine.patching.artefact_files import write
from engine.patching.base import BaseVocabulary, base_of
from engine.patching.merging import Merger
from engine.patching.verify import speed
from engine.tokenization import Detokenizer, load_tokenizer
from engine.tokenization.hf import load_base_tokenizer
from engine.tokenization.patched import PatchedTokenizer, load_patched
from tests.models import npm_tokenizer_dir, smollm2_dir
from tests.patch.bases import SP_TEXT, decompositions, flat, small_patch

TEXTS = (*SP_TEXT, "", " ", "  two  spaces ", "the lazy dog</s>the lazy dog", "Größe 🙂 你好 the quick brown fox",
         "times, it was the\n\nworst of\ttimes", "<s>the", "naïve café\u0301 naïve", "x" * 300)  # fmt: skip
KINDS = ("bytes", "pieces")


def _upstream_rule(ids: Sequence[int], removed: dict[int, tuple[int, ...]], ngrams: Sequence[tuple[int, ...]],
                   size: int) -> list[int]:
    """The rule as it is defined: the first n-gram in priority order that matches, position by position."""
    ids = [part for token in ids for part in removed.get(token, (token,))]
    out, at = [], 0
    while at < len(ids):
        for index, pieces in enumerate(ngrams):
            if tuple(ids[at : at + len(pieces)]) == pieces:
                out.append(size + index)
                at += len(pieces)
                break
        else:
            out.append(ids[at])
            at += 1
    return out


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5).map(tuple), max_size=14, unique=True),
       st.lists(st.integers(0, 5), max_size=40), st.booleans())
def test_the_merge_rule_is_upstreams(ngrams: list[tuple[int, ...]], ids: list[int], moved: bool) -> None:
    """Leftmost-longest over the pruned list equals the linear scan in priority order; ids that move, too."""
    size, removed = 6, {4: (0, 1, 0), 5: (2, 2)}
    new_of = {token: token + 100 * moved for token in range(4)}
    merge = Merger(size, removed, ngrams, [size + index for index in range(len(ngrams))], new_of)
    wanted = [new_of.get(token, token) for token in _upstream_rule(ids, removed, ngrams, size)]
    assert merge(ids) == wanted
    traced = merge.traced(ids)
    assert traced.ids == wanted
    assert len(traced.starts) == len(wanted)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path], bases: dict[str, BaseVocabulary],
              tmp_path_factory: pytest.TempPathFactory) -> PatchedTokenizer:
    """A patch of each tiny base, n-grams taken from TEXTS (byte pieces among them)."""
    place = tmp_path_factory.mktemp("patch")
    write(small_patch(folders[request.param], bases[request.param], TEXTS), place)
    loaded = load_tokenizer(folders[request.param], patch=place)
    assert isinstance(loaded, PatchedTokenizer)
    return loaded


@pytest.mark.parametrize("skip", [True, False])
def test_texts_survive_and_streams_equal_the_whole(tokenizer: PatchedTokenizer, skip: bool) -> None:
    """decode(encode) is what the base makes of its own ids; the incremental detokenizer gives the same text."""
    used = set()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        used.update(ids)
        whole = tokenizer.decode(ids, skip)
        assert whole == tokenizer.base.decode(tokenizer.base.encode(text), skip)
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        assert "".join(stream.push([token]).text for token in ids) + stream.finish().text == whole
        assert tokenizer.encode_batch([text, "a"])[0] == ids
    assert len(used & set(tokenizer.artefact.ngram_ids)) > 20


@given(st.data())
def test_any_ids_stream_as_they_decode(tokenizer: PatchedTokenizer, data: st.DataObject) -> None:
    """Ids in any order, n-grams that hold bytes included: pushed one by one they give the text of all."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    stream = Detokenizer(tokenizer)
    streamed = "".join(stream.push([token]).text for token in ids) + stream.finish().text
    assert streamed == Detokenizer(tokenizer.base).push(tokenizer.to_base_ids(ids)).text + _rest(tokenizer, ids)


def _rest(tokenizer: PatchedTokenizer, ids: list[int]) -> str:
    """What the base's stream holds back until its end."""
    stream = Detokenizer(tokenizer.base)
    stream.push(tokenizer.to_base_ids(ids))
    return stream.finish().text


def test_byte_pieces_inside_ngrams(folders: dict[str, Path], bases: dict[str, BaseVocabulary], tmp_path: Path) -> None:
    """An n-gram may begin inside a character and end in the next piece: the stream waits for the character."""
    base = bases["pieces"]
    smile = [base.ids[f"<0x{byte:02X}>"] for byte in "🙂".encode()]
    the = base.ids["▁the"]
    made = allocate(base, {}, [(the, smile[0]), (smile[2], smile[3], the), (smile[1], smile[2])])
    write(made, tmp_path)
    tokenizer = load_tokenizer(folders["pieces"], patch=tmp_path)
    first, last, _ = made.ngram_ids
    stream = Detokenizer(tokenizer, stop=["🙂 t"])
    assert stream.push([first]).text == "the"
    assert stream.push([smile[1]]).text == ""
    delta = stream.push([last])
    assert (delta.text, delta.stopped) == ("", "🙂 t")
    assert tokenizer.token_bytes(last) == "🙂".encode()[2:] + b" the"


def test_special_tokens_are_barriers(tokenizer: PatchedTokenizer) -> None:
    """No token reaches across one; read as ordinary text, its string makes no special id."""
    special = next(text for text in tokenizer.base.named_specials.values() if "s>" in text or "eos" in text)
    text = f"the lazy dog{special}the lazy dog"
    mark = tokenizer.artefact.new_id_of[tokenizer.base.vocab()[special]]
    ids = tokenizer.encode(text, False)
    at = ids.index(mark)
    assert tokenizer.decode(ids[:at]) == "the lazy dog"
    plain = tokenizer.encode(text, False, parse_special=False)
    assert mark not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text, False) == ids


def test_offsets_tile_the_text(tokenizer: PatchedTokenizer) -> None:
    """The same ids; spans in order; where text is its own bytes, each span is the text of its token."""
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text, False)
        assert ids == tokenizer.encode(text, False)
        assert all(first[1] <= second[1] and first[0] <= second[0] for first, second in itertools.pairwise(offsets))
        assert offsets == [] or (offsets[-1][1] == len(text))
        for token, (begin, end) in zip(ids, offsets, strict=True):
            if text.isascii() and token not in tokenizer.special_ids:
                assert text[begin:end].strip() == tokenizer.token_bytes(token).decode().strip()


def test_beginnings_and_ends(folders: dict[str, Path], bases: dict[str, BaseVocabulary], tmp_path: Path) -> None:
    """BOS as the base adds it, unless the artefact says its model never saw one; ids that move are mapped; ids of a
    model folder whose config says so are patched ones already."""
    base, folder = bases["pieces"], folders["pieces"]
    made = small_patch(folder, base, TEXTS)
    top = made.vocab_size - 1  # the same vocabulary, every id turned around, as imported ones are
    turned = replace(made, old_ids=made.old_ids[::-1], ngram_ids=tuple(top - new for new in made.ngram_ids),
                     new_id_of={old: top - new for old, new in made.new_id_of.items()}, meta={"add_bos": False})
    write(made, tmp_path / "with")
    write(turned, tmp_path / "without")
    adds = load_tokenizer(folder, patch=tmp_path / "with")
    plain = load_tokenizer(folder, patch=tmp_path / "without")
    assert adds.bos_id == base.ids["<s>"] and adds.encode("the")[0] == adds.bos_id
    assert (plain.bos_id, plain.eos_ids) == (top - base.ids["<s>"], (top - base.ids["</s>"],))
    assert plain.bos_id not in plain.encode("the")
    assert plain.special_ids == {top - token for token in base.special_ids}
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((folder / name).read_bytes())
    write(turned, model / "patch")
    (model / "config.json").write_text(json.dumps({"tessera_patch": {}, "eos_token_id": [7, 9]}))
    own = load_tokenizer(model)
    assert isinstance(own, PatchedTokenizer)
    assert (own.bos_id, own.eos_ids) == (plain.bos_id, (7, 9))
    (model / "config.json").write_text(json.dumps({"eos_token_id": [min(made.removed)]}))
    with pytest.raises(LoadError, match="begins or ends"):
        load_tokenizer(model)


def test_upstream_mode_keeps_its_faults(folders: dict[str, Path], bases: dict[str, BaseVocabulary],
                                        tmp_path: Path) -> None:
    """The unknown token comes out as its base id only there; by default it is the token it is."""
    base, folder = bases["pieces"], folders["pieces"]
    made = small_patch(folder, base, TEXTS)
    top = made.vocab_size - 1
    write(replace(made, old_ids=made.old_ids[::-1], ngram_ids=tuple(top - new for new in made.ngram_ids),
                  new_id_of={old: top - new for old, new in made.new_id_of.items()}), tmp_path)
    unknown = base.ids["<unk>"]
    ours, theirs = load_patched(folder, tmp_path), load_patched(folder, tmp_path, upstream=True)
    assert ours.encode("<unk>", False)[0] == top - unknown
    assert theirs.encode("<unk>")[0] == unknown
    assert ours.encode("the<s>", False) == theirs.encode("the<s>")


def test_base_ids_map_or_are_refused(tokenizer: PatchedTokenizer) -> None:
    """A kept id has one new id; a removed one has none and the error says so."""
    kept = next(iter(tokenizer.artefact.new_id_of))
    assert tokenizer.to_new_id(kept) == tokenizer.artefact.new_id_of[kept]
    for token, why in ((min(tokenizer.artefact.removed), "was removed"), (10**6, "not in the base")):
        with pytest.raises(RequestError, match=why):
            tokenizer.to_new_id(token)


@pytest.mark.parametrize("kind", KINDS)
def test_appended_merges_never_cost_more(kind: str, folders: dict[str, Path], bases: dict[str, BaseVocabulary],
                                         tmp_path: Path) -> None:
    """Every text has at most the base's tokens, decodes the same, and special tokens keep their ids."""
    base, folder = bases[kind], folders[kind]
    plain, _ = load_base_tokenizer(folder)
    strings, merges, taken = base.strings, [], set(base.ids)
    for text in TEXTS:
        for left, right in itertools.pairwise(plain.encode(text, False)):
            spelled = f"{strings[left]}{strings[right]}"
            if spelled not in taken and base.special_ids.isdisjoint((left, right)):
                taken.add(spelled)
                merges.append((left, right))
    write(allocate_merges(base, merges), tmp_path)
    tokenizer = load_tokenizer(folder, patch=tmp_path)
    saved = 0
    for text in TEXTS:
        ids, before = tokenizer.encode(text), plain.encode(text)
        assert len(ids) <= len(before)
        assert tokenizer.decode(ids, False) == plain.decode(before, False)
        saved += len(before) - len(ids)
    assert saved > 20


def _documents(chars: int) -> list[str]:
    """Prose and code that every machine has: the standard library's longest modules, cut at blank lines."""
    files = sorted(glob.glob(sysconfig.get_path("stdlib") + "/[a-t]*.py"), key=lambda name: -Path(name).stat().st_size)
    text = "\n\n".join(Path(name).read_text("utf-8", "replace") for name in files[:30])[:chars]
    return [text[start : start + 2000] for start in range(0, len(text), 2000)]


def _real_dir(name: str) -> Path:
    return smollm2_dir() if name == "smollm2" else npm_tokenizer_dir(name)


def _real_patch(folder: Path, texts: Sequence[str], count: int, out: Path) -> None:
    """count n-grams of the texts, and 200 removed tokens that occur in them or not."""
    plain, definition = load_base_tokenizer(folder)
    base = base_of(plain.vocab(), plain.table, definition)
    parts_of = decompositions(definition)
    removed = set(sorted(parts_of)[5_000:20_000:75]) - base.special_ids
    seen: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        ids = plain.encode(text, False)
        for length in (2, 3):
            seen.update(zip(*(ids[start:] for start in range(length)), strict=False))
    ranked = sorted(seen, key=lambda pieces: (-seen[pieces] * (len(pieces) - 1), pieces))
    ngrams = [pieces for pieces in ranked if base.special_ids.isdisjoint(pieces)][:count]
    write(allocate(base, {token: flat(token, parts_of, removed) for token in removed}, ngrams), out)


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "llama3", "qwen2_5", "llama2"])
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """Byte-level and SentencePiece bases (llama2's is Mistral v1): texts survive, streams are exact, tokens fewer."""
    folder = _real_dir(name)
    texts = [*_documents(30_000), *TEXTS]
    _real_patch(folder, texts[:-4], 2_000, tmp_path)
    tokenizer = load_patched(folder, tmp_path)
    before = after = 0
    for text in texts:
        ids, plain = tokenizer.encode(text), tokenizer.base.encode(text)
        before, after = before + len(plain), after + len(ids)
        whole = tokenizer.base.decode(plain)
        assert tokenizer.decode(ids) == whole
        stream = Detokenizer(tokenizer)
        assert "".join(stream.push([token]).text for token in ids) + stream.finish().text == whole
        assert tokenizer.encode_with_offsets(text)[0] == ids
    assert after < 0.8 * before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gpt2", "llama3", "qwen2_5", "llama2"])
def test_encoding_keeps_its_speed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text in, ids out, 10,000 n-grams, one thread: at least 0.8 of the base tokenizer's own encode."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = _real_dir(name)
    texts = _documents(600_000)
    _real_patch(folder, texts, 10_000, tmp_path)
    best = max(speed(folder, tmp_path, texts)["ratio"] for _ in range(2))
    assert best >= 0.8
