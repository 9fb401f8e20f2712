"""Streaming: for every split, what was sent is a prefix of the whole and in the end all of it; stops cut exactly."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import InvariantError
from engine.tokenization import Detokenizer, HfTokenizer
from engine.tokenization.stream import unfinished_bytes, whole_characters
from tests.text.conftest import real

STYLES = ("smollm2", "llama2", "llama3_2", "qwen2_5")  # llama2 is SentencePiece with byte fallback
ALPHABET = "ab \né的🙂𓀀"


def cut(items: list[int], sizes: list[int]) -> list[list[int]]:
    """Items in pieces of the given sizes, repeated; an empty piece now and then."""
    pieces, at, turn = [], 0, 0
    while at < len(items):
        size = sizes[turn % len(sizes)]
        turn += 1
        pieces.append(items[at : at + size])
        at += size
    return pieces


def awkward_ids(tokenizer: HfTokenizer) -> list[int]:
    """Ids whose bytes are no whole characters, spaces, newlines, and a few specials: where streams go wrong."""
    table = tokenizer.table
    broken = [i for i, piece in enumerate(table.pieces) if not _is_text(piece)][:200]
    found = broken + sorted(table.byte_ids) + sorted(tokenizer.special_ids)[:3]
    return found + [token for text in (" ", "\n", "a", " a", "的") for token in tokenizer.encode(text, False)]


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("name", STYLES)
def test_every_split_of_any_ids_equals_decode(name: str) -> None:
    """Random ids, half of them parts of characters: sent text is always a prefix of the whole, and complete."""
    tokenizer = real(name)
    some = st.one_of(st.sampled_from(awkward_ids(tokenizer)), st.integers(0, tokenizer.vocab_size + 3))

    @settings(max_examples=250)
    @given(st.lists(some, max_size=16), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans())
    def check(ids: list[int], sizes: list[int], skip: bool) -> None:
        whole = tokenizer.decode(ids, skip)
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        sent = ""
        for piece in cut(ids, sizes if any(sizes) else [1]):
            delta = stream.push(piece)
            assert delta.stopped is None and delta.num_tokens_kept == len(piece)
            sent += delta.text
            assert whole.startswith(sent)
        assert sent + stream.finish().text == whole

    check()


@pytest.mark.parametrize("name", STYLES)
def test_text_is_sent_as_soon_as_it_is_certain(name: str) -> None:
    """Without stop strings, only an unfinished character (or a run of byte tokens) waits."""
    tokenizer = real(name)
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode("The capital is 巴黎 🙂 indeed", add_special_tokens=False)
    for count in range(1, len(ids) + 1):
        stream_text = stream.push(ids[count - 1 : count]).text
        settled = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        if ids[count - 1] not in tokenizer.table.byte_ids and settled == tokenizer.decode(ids[:count]):
            assert stream_text, f"token {count} of {len(ids)} was complete but held back"


def expected_stop(tokenizer: HfTokenizer, ids: list[int], stops: list[str], min_tokens: int) -> tuple[int, str] | None:
    """The rule in words: after each token look at the whole text; the stop string that is complete first, if it was
    completed by a token after the first min_tokens, ends the text. Returns (tokens kept, text before it)."""
    known = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        text = text if len(text) > len(known) else known
        hits = []
        for stop in stops:
            at = text.find(stop, max(0, len(known) - len(stop) + 1))
            while at >= 0 and at + len(stop) <= len(known):
                at = text.find(stop, at + 1)
            if at >= 0:
                hits.append((at + len(stop), at))
        if hits and count > min_tokens:
            return count, text[: min(hits)[1]]
        known = text
    return None


@pytest.mark.parametrize("name", STYLES)
def test_stop_strings_cut_where_the_rule_says(name: str) -> None:
    """For every text, set of stops, min_tokens and split: same text, same token, and nothing sent is taken back."""
    tokenizer = real(name)
    words = st.text(ALPHABET, min_size=1, max_size=4)

    @settings(max_examples=300)
    @given(st.text(ALPHABET, max_size=14), st.lists(words, min_size=1, max_size=3), st.integers(0, 5),
           st.lists(st.integers(1, 4), min_size=1, max_size=3))  # fmt: skip
    def check(text: str, stops: list[str], min_tokens: int, sizes: list[int]) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = Detokenizer(tokenizer, stop=stops, min_tokens=min_tokens)
        sent, kept, stopped = "", 0, None
        for piece in cut(ids, sizes):
            delta = stream.push(piece)
            sent, kept, stopped = sent + delta.text, kept + delta.num_tokens_kept, delta.stopped
            if stopped is not None:
                break
        sent += stream.finish().text
        expected = expected_stop(tokenizer, ids, stops, min_tokens)
        if expected is None:
            assert stopped is None and sent == tokenizer.decode(ids) and kept == len(ids)
        else:
            assert (kept, sent) == expected and stopped in stops

    check()


def test_a_possible_stop_is_held_and_given_back(tiny: HfTokenizer) -> None:
    """'ab' waits while it may become 'abc', and is sent when it does not."""
    stream = Detokenizer(tiny, stop=["abc"])
    first = stream.push(tiny.encode("x a") + tiny.encode("b"))
    assert first.text == "x " and first.stopped is None
    assert stream.push(tiny.encode("d")).text == "abd"
    last = stream.push(tiny.encode("zab") + tiny.encode("c") + tiny.encode("never"))
    assert (last.text, last.stopped) == ("z", "abc")
    assert last.num_tokens_kept == len(tiny.encode("zab")) + 1
    after = stream.push(tiny.encode("more"))
    assert (after.text, after.stopped, after.num_tokens_kept) == ("", "abc", 0)
    assert stream.finish().text == ""


def test_a_held_prefix_is_flushed_at_the_end(tiny: HfTokenizer) -> None:
    """A stream that ends on half a stop string or half a character loses nothing."""
    stream = Detokenizer(tiny, stop=["abc"])
    euro = [token for token in tiny.encode("€")]
    sent = stream.push([*tiny.encode("ab"), *euro[:1]]).text
    assert sent + stream.finish().text == tiny.decode([*tiny.encode("ab"), *euro[:1]])
    with pytest.raises(InvariantError):
        stream.push([5])


def test_newline_stops_at_once_where_it_is_a_byte_token() -> None:
    """In SentencePiece vocabularies a newline is a byte token: it stops on the token that completes it."""
    tokenizer = real("llama2")
    ids = tokenizer.encode("one\n\ntwo", add_special_tokens=False)
    stream = Detokenizer(tokenizer, stop=["\n\n"])
    deltas = [stream.push([token]) for token in ids]
    first = next(number for number, delta in enumerate(deltas) if delta.stopped)
    assert tokenizer.decode(ids[: first + 1]) == "one\n\n"
    assert "".join(delta.text for delta in deltas) == "one"


def test_a_continuation_keeps_its_first_space() -> None:
    """decode of an answer alone drops SentencePiece's first space; an answer that continues a prompt keeps it."""
    tokenizer = real("llama2")
    ids = tokenizer.encode("world", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(ids).text == "world"
    assert Detokenizer(tokenizer, continues=True).push(ids).text == " world"


def test_work_per_token_does_not_grow_with_the_text(tiny: HfTokenizer) -> None:
    """40,000 tokens with stop strings that almost match: the last quarter is no slower than the first (times 3)."""
    stream = Detokenizer(tiny, stop=["aaaaaaaaaaab", "zzz"])
    ids = tiny.encode("a" * 7 + " b 🙂") * 4000
    quarter = len(ids) // 4
    spent = []
    for number in range(4):
        began_s = time.perf_counter()
        for token in ids[number * quarter : (number + 1) * quarter]:
            stream.push([token])
        spent.append(time.perf_counter() - began_s)
    assert spent[3] < 3 * spent[0] + 0.05, spent


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_cut_anywhere_and_its_rest_make_the_text(style: str) -> None:
    """Also inside a character: the rest begins with the whole of it; a rest that does not end it begins afresh."""
    tokenizer = real(style)
    table = tokenizer.table
    ids = tokenizer.encode("x é 你好 🙂𓀀 y", False)
    text, fresh = b"".join(map(table.piece, ids)).decode(), tokenizer.encode("a", False)[-1]
    cuts = set()
    for at in range(len(ids) + 1):
        begun = unfinished_bytes(table, ids[:at])
        cuts.add(len(begun))
        stream = Detokenizer(tokenizer, continues=True, begun=begun)
        said = stream.push(ids[at:]).text + stream.finish().text
        before = b"".join(map(table.piece, ids[:at]))
        assert before[: len(before) - len(begun)].decode() + said == text
        other = Detokenizer(tokenizer, continues=True, begun=begun)
        assert other.push([fresh]).text == table.piece(fresh).decode()
        shown = whole_characters(table, ids[:at], tokenizer.decode(ids[:at], False))
        echoed = Detokenizer(tokenizer, continues=at > 0, begun=begun, owed=True)
        whole = tokenizer.decode(ids, False)
        assert shown + echoed.push(ids[at:]).text + echoed.finish().text == whole
        echoed = Detokenizer(tokenizer, continues=True, begun=begun, owed=True)
        never = echoed.push([fresh]).text
        wanted = 0 if not begun else len(begun) if table.byte_runs else 1
        assert never == "\ufffd" * wanted + table.piece(fresh).decode() and "\ufffd" not in shown
    assert len(cuts) >= 3


def test_only_the_beginning_of_a_character_counts_as_unfinished(tiny: HfTokenizer) -> None:
    """Whole characters, stray continuation bytes and special tokens are no beginning."""
    byte_of = {piece[0]: token for token, piece in enumerate(tiny.table.pieces) if len(piece) == 1}
    smile = [byte_of[byte] for byte in "🙂".encode()]
    for ids, wanted in (([], b""), (smile, b""), (smile[:3], "🙂".encode()[:3]), (smile[1:3], b""),
                        ([*smile[:2], 3], b""), ([byte_of[0xC3], byte_of[0x41]], b""), (smile * 9, b""),
                        (smile * 9 + smile[:1], "🙂".encode()[:1])):  # fmt: skip
        assert unfinished_bytes(tiny.table, ids) == wanted
