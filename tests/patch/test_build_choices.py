"""Counting, selection, removal and the matcher against slow plain models of themselves, on small random corpora."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.patching import select
from engine.patching.appended import Words, learn_merges
from engine.patching.artefact import allocate
from engine.patching.base import load_base
from engine.patching.corpus import TokenStream
from engine.patching.count import Joins, count_ngrams, merge
from engine.patching.merging import Merger
from engine.patching.remove import choose_removed, expand, first_merges
from engine.patching.report import measure, statistics
from engine.patching.select import LEAST_SAVING, select_ngrams
from tests.models import TINY_VOCAB, write_tiny_tokenizer

VOCAB = 9
Documents = list[list[int]]


def random_documents(seed: int, count: int = 12, longest: int = 60) -> Documents:
    """Documents over a few ids with repeated phrases, runs and an empty one."""
    draw = random.Random(seed)
    phrases = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 4))] for _ in range(6)] + [[1, 1, 1], [2, 2]]
    documents: Documents = [[]]
    for _ in range(count):
        ids: list[int] = []
        size = draw.randint(1, longest)
        while len(ids) < size:
            ids += draw.choice(phrases) if draw.random() < 0.7 else [draw.randrange(VOCAB)]
        documents.append(ids)
    return documents


def stream_of(documents: Documents) -> TokenStream:
    """The stream of documents, in memory."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.array([token for document in documents for token in document], np.uint32)
    return TokenStream(ids, np.concatenate(([0], np.cumsum(lengths))), lengths * 3, lengths * 3, "")


def joins_of(within_word: bool = False) -> Joins:
    """Id 8 may not be in an n-gram; ids 0 and 3 begin words."""
    usable = np.ones(VOCAB, bool)
    usable[8] = False
    opens = np.zeros(VOCAB, bool)
    opens[[0, 3]] = True
    return Joins(usable, opens if within_word else None)


def allowed(ngram: Sequence[int], within_word: bool) -> bool:
    """joins_of, in plain words."""
    return 8 not in ngram and not (within_word and {0, 3} & set(ngram[1:]))


def occurrences(documents: Documents, n: int, within_word: bool = False) -> Counter[tuple[int, ...]]:
    """Every n-gram of length n, counted one by one."""
    grams = (tuple(ids[at:at + n]) for ids in documents for at in range(len(ids) - n + 1))
    return Counter(gram for gram in grams if allowed(gram, within_word))


@pytest.mark.parametrize("within_word", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 50, 1 << 20])
def test_counts_are_exact_whatever_the_chunks(tmp_path: Path, chunk_tokens: int, within_word: bool) -> None:
    """Streaming equals in-memory: sorted runs on disk, pruning and chunk borders lose and invent nothing."""
    for seed, min_count in ((1, 1), (2, 2), (3, 4)):
        documents = random_documents(seed)
        levels = count_ngrams(stream_of(documents), joins_of(within_word), 4, min_count, tmp_path,
                              chunk_tokens=chunk_tokens)
        for n, level in enumerate(levels, 2):
            expected = {gram: count for gram, count in occurrences(documents, n, within_word).items()
                        if count >= min_count}
            grams = [tuple(row) for row in level.tokens.tolist()]
            assert grams == sorted(grams)
            assert dict(zip(grams, level.counts.tolist())) == expected
            flat, starts = stream_of(documents).ids.tolist(), set(stream_of(documents).starts.tolist())
            for at, number in enumerate(level.at.tolist()):
                here = tuple(flat[at:at + n])
                crosses = any(border in starts for border in range(at + 1, at + len(here)))
                assert (number < len(grams) and grams[number] == here) or crosses or here not in expected


def test_runs_merge_range_by_range() -> None:
    """A merge that never holds more than a few entries gives what one that holds all gives."""
    draw = random.Random(0)
    runs = []
    for _ in range(5):
        keys = np.array(sorted(draw.sample(range(300), 120)), np.uint64)
        runs.append((keys, np.array([draw.randint(1, 3) for _ in keys], np.int64)))
    whole = list(merge(runs, 4))
    parts = list(merge(runs, 4, budget_entries=40))
    assert len(whole) == 1 and len(parts) > 5
    for index in range(2):
        assert np.concatenate([part[index] for part in parts]).tolist() == whole[0][index].tolist()


def slow_selection(documents: Documents, count: int, max_n: int, within_word: bool
                   ) -> list[tuple[tuple[int, ...], int]]:
    """The definition: before every choice, every n-gram is recounted over whole units. Nothing is remembered."""
    units = [[[token] for token in ids] for ids in documents]
    spots: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for n in range(2, max_n + 1):
        for gram, total in occurrences(documents, n, within_word).items():
            if total < LEAST_SAVING:
                continue
            spots[gram] = []
            for number, ids in enumerate(documents):
                at = 0
                while at + n <= len(ids):
                    hit = tuple(ids[at:at + n]) == gram
                    if hit:
                        spots[gram].append((number, at))
                    at += n if hit else 1
    chosen: list[tuple[tuple[int, ...], int]] = []
    while len(chosen) < count:
        borders = [set(itertools.accumulate((len(unit) for unit in row), initial=0)) for row in units]

        def savings(gram: tuple[int, ...], borders: list[set[int]] = borders) -> int:
            whole = [(number, at) for number, at in spots[gram] if {at, at + len(gram)} <= borders[number]]
            return sum(len(borders[number] & set(range(at + 1, at + len(gram)))) for number, at in whole)

        best = min(spots, key=lambda gram: (-savings(gram), gram), default=None)
        if best is None or savings(best) < LEAST_SAVING:
            break
        chosen.append((best, savings(best)))
        for number, at in spots.pop(best):
            if {at, at + len(best)} <= borders[number]:
                inner = borders[number] - set(range(at + 1, at + len(best)))
                cuts = sorted(inner)
                units[number] = [documents[number][a:b] for a, b in itertools.pairwise(cuts)]
                borders[number] = inner
    return chosen


@pytest.mark.parametrize("within_word", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_selection_is_the_exact_greedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int,
                                       within_word: bool) -> None:
    """The queue with recounts on demand chooses what recounting everything every time chooses, savings included;
    neither the count at which it starts to look nor the size of the pool shows."""
    documents = random_documents(seed, 16, 70)
    expected = slow_selection(documents, 14, 4, within_word)
    assert len(expected) == 14
    for min_count, factor in ((None, 6), (9, 6), (5, 1)):
        monkeypatch.setattr(select, "POOL_FACTOR", factor)
        found = select_ngrams(stream_of(documents), joins_of(within_word), 14, 4, tmp_path, min_count=min_count)
        assert [(choice.ngram, choice.saving) for choice in found] == expected


def test_selection_ends_where_nothing_is_left_to_save(tmp_path: Path) -> None:
    """Asked for more than the corpus has, it gives fewer; what is refused is never chosen."""
    documents: Documents = [[1, 2, 3, 1, 2, 3, 1, 2, 3], [5, 6, 5, 6]]
    found = select_ngrams(stream_of(documents), joins_of(), 50, 3, tmp_path)
    assert [choice.ngram for choice in found] == [(1, 2, 3), (5, 6)]
    refused = select_ngrams(stream_of(documents), joins_of(), 50, 3, tmp_path, lambda ngram: ngram != (1, 2, 3))
    assert (1, 2, 3) not in [choice.ngram for choice in refused] and len(refused) >= 2
    assert select_ngrams(stream_of([[1], [2]]), joins_of(), 5, 3, tmp_path) == []


@pytest.fixture(scope="module")
def tiny_definition(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The tiny byte-level vocabulary's tokenizer.json."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    definition: dict[str, object] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return definition


@pytest.mark.parametrize("seed", range(3))
def test_removal_is_cheapest_first_and_its_cost_is_what_the_corpus_grows_by(
        seed: int, tiny_definition: dict[str, object]) -> None:
    """Each step takes a token whose loss costs least at that moment, found here by trying all of them; parts spell
    the token, are two or more, and none is removed; single bytes, specials and what `never` names stay."""
    draw = random.Random(seed)
    merges = first_merges(tiny_definition)
    frequencies = [draw.choice((0, 0, 1, 2, 5, 40)) for _ in range(TINY_VOCAB)]
    never = frozenset(draw.sample(sorted(merges), 20))
    removals = choose_removed(merges, frequencies, 120, never)
    corpus = np.repeat(np.arange(TINY_VOCAB, dtype=np.uint32), frequencies)

    def spell(token: int, gone: set[int]) -> tuple[int, ...]:
        return (token,) if token not in gone else spell(merges[token][0], gone) + spell(merges[token][1], gone)

    gone: set[int] = set()
    size = len(corpus)
    for removal in removals:
        current = expand(corpus, {token: spell(token, gone) for token in gone}, TINY_VOCAB)[0]
        have = np.bincount(current, minlength=TINY_VOCAB)
        costs = {token: int(have[token]) * (len(spell(token, gone | {token})) - 1)
                 for token in merges if token not in gone | never}
        assert costs[removal.token] == min(costs.values()) == removal.cost
        gone.add(removal.token)
    model = tiny_definition["model"]
    assert isinstance(model, dict)
    spelling = {token: text for text, token in model["vocab"].items()}
    for removal in removals:
        assert removal.parts == spell(removal.token, gone) and len(removal.parts) >= 2
        assert "".join(spelling[part] for part in removal.parts) == spelling[removal.token]
        assert len(spelling[removal.token]) > 1 and removal.token not in never and not gone & set(removal.parts)
    grown = expand(corpus, {removal.token: removal.parts for removal in removals}, TINY_VOCAB)[0]
    assert len(grown) - size == sum(removal.cost for removal in removals)


def test_removing_everything_leaves_single_characters(tiny_definition: dict[str, object]) -> None:
    """Asked for more than can go, it removes every merged token and no other."""
    merges = first_merges(tiny_definition)
    removals = choose_removed(merges, [1] * TINY_VOCAB, 10 * TINY_VOCAB)
    assert {removal.token for removal in removals} == set(merges)
    assert all(part not in merges for removal in removals for part in removal.parts)


@pytest.mark.parametrize("chunk_tokens", [1, 37, 1 << 20])
def test_figures_are_those_of_the_encoder(tmp_path: Path, chunk_tokens: int) -> None:
    """Tokens a document and uses of each n-gram equal what the serving encoder's second stage gives, in any chunks."""
    write_tiny_tokenizer(tmp_path)
    base = load_base(tmp_path)
    draw = random.Random(5)
    ids = [4 + draw.randrange(12) for _ in range(600)]
    documents = [ids[:1], ids[1:200], [], ids[200:]]
    ngrams = sorted({tuple(ids[at:at + n]) for at in range(0, 500, 9) for n in (2, 3, 4)}, key=lambda g: (-len(g), g))
    removed = {300 + number: (4 + number, 5, 6) for number in range(3)}
    documents.append([300, 9, 301, 302, 4, 5, 6])
    artefact = allocate(base, dict(list(removed.items())), ngrams)
    merger = Merger(base.vocab_size, artefact.removed, artefact.ngrams, artefact.ngram_ids, artefact.new_id_of)
    encoded = [merger(document) for document in documents]
    measured = measure(stream_of(documents), removed, ngrams, base.vocab_size, chunk_tokens)
    assert measured.patched.tolist() == [len(row) for row in encoded]
    uses = Counter(token for row in encoded for token in row)
    assert measured.uses.tolist() == [uses[token] for token in artefact.ngram_ids]


def test_statistics_follow_their_formulas() -> None:
    """Ratio of sums, not mean of ratios; never clamped; the same numbers each time; a document without tokens
    counts nowhere."""
    base, patched = np.array([100, 10, 0, 50]), np.array([80, 12, 0, 40])
    stats = statistics(base, patched, base * 4, 5, "ab")
    rho = 132 / 160
    squares = float(((patched - rho * base) ** 2).sum())
    assert stats["documents"] == 3 and stats["rho"] == rho and stats["max"] == 1.2 and stats["rho_max"] == 5
    assert stats["se"] == pytest.approx((3 / 2 * squares / 160**2) ** 0.5, abs=1e-6)
    assert stats["phi"] == pytest.approx(squares / 160, abs=1e-6)
    assert stats["ci95_low"] <= rho <= stats["ci95_high"]
    assert stats["tokens_per_char_before"] == 0.25 and stats["tokens_per_char_after"] == round(132 / 640, 6)
    assert statistics(base, patched, base * 4, 5, "ab") == stats
    assert statistics(base[:0], patched[:0], base[:0], 1, "") == {"documents": 0}


def words_of(*counted: tuple[list[int], int]) -> Words:
    """Words with how often each occurs."""
    words = Words()
    for ids, count in counted:
        ends = np.zeros(len(ids) * count, bool)
        ends[len(ids) - 1::len(ids)] = True
        words.add(np.array(ids * count, np.uint32), ends)
    return words


def test_merges_make_new_spellings_only_and_stay_inside_words() -> None:
    """A pair that spells a token of the base is left alone (its merge could set earlier rules off again), as are pairs
    across words, unusable ids, and a word's beginning on the right."""
    strings = ("a", "b", "c", "bc", "x", " d")
    joins = Joins(np.array([True, True, True, True, False, True]), np.array([False] * 5 + [True]))
    words = words_of(([0, 1, 2], 5), ([1, 2], 90), ([0, 4], 50), ([0, 5], 50), ([0], 70), ([1, 0, 0, 0, 0, 0], 2))
    found = [(merge.left, merge.right, merge.saving) for merge in learn_merges(words, joins, strings, 9, 3)]
    assert found == [(0, 1, 5), (6, 2, 5), (0, 0, 4), (1, 8, 2), (8, 0, 2)]
    assert [merge.right for merge in learn_merges(words, joins, strings, 9, 2)] == [1, 0]


def test_words_are_counted_whatever_the_batches() -> None:
    """The same words in one call or many."""
    once, often = words_of(([3, 4], 7), ([3, 4, 5], 2)), words_of(*[([3, 4], 1)] * 7, *[([3, 4, 5], 1)] * 2)
    assert [(row.tolist(), count) for row, count in once.rows()] == [([3, 4], 7), ([3, 4, 5], 2)]
    assert [(row.tolist(), count) for row, count in often.rows()] == [([3, 4], 7), ([3, 4, 5], 2)]
