"""The laws of the ledger: books that balance, refusals that are values, closed forms for any group size."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import ConfigError, InvariantError
from engine.core.ledger import ADMISSION_RULES, EXACT, UPSTREAM, KvLedger


def straddling(token_bytes: int, page_bytes: int):
    """groups(len) = ceil(len * b / S): a token may lie across two pages."""
    return lambda tokens: -(-tokens * token_bytes // page_bytes)


@given(
    st.integers(1, 4096).flatmap(lambda b: st.tuples(st.just(b), st.integers(b, 16 * b))),
    st.integers(1, 300),
    st.integers(0, 2**32),
)
def test_books_balance_under_any_history(shape: tuple[int, int], total: int, seed: int) -> None:
    """free = total - sum groups(reserved) after every operation, against a dict of lengths as the model."""
    groups_for = straddling(*shape)
    ledger = KvLedger(total, groups_for, EXACT)
    rng = random.Random(seed)
    lengths: dict[int, int] = {}
    for seq_id in range(60):
        tokens = rng.randrange(1, 40)
        if ledger.may_admit(tokens) is None:
            covered = ledger.reserve(seq_id, tokens)
            lengths[seq_id] = tokens
            assert groups_for(covered) == groups_for(tokens) < groups_for(covered + 1)
        for grown in rng.sample(sorted(lengths), min(3, len(lengths))):
            wanted = lengths[grown] + rng.randrange(1, 9)
            need = groups_for(wanted) - groups_for(lengths[grown])
            assert ledger.may_append(grown, wanted) == (need <= ledger.free_groups or need == 0)
            if ledger.may_append(grown, wanted):
                assert ledger.grow(grown, wanted) >= wanted
                lengths[grown] = wanted
        if lengths and rng.random() < 0.3:
            gone = rng.choice(sorted(lengths))
            assert ledger.release(gone) == groups_for(lengths.pop(gone))
        assert ledger.free_groups == total - sum(groups_for(tokens) for tokens in lengths.values())
        ledger.check(lengths)


def test_watermark_is_one_in_a_hundred_rounded_down() -> None:
    """int(0.01 * total): none below 100 groups."""
    for total, expected in ((99, 0), (100, 1), (199, 1), (280, 2), (4096, 40)):
        assert KvLedger(total, lambda t: t).watermark_groups == expected


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    """Upstream: always. Exact: only beside others, so that one request may have the whole pool."""
    upstream, exact = (KvLedger(200, lambda t: t, rule) for rule in (UPSTREAM, EXACT))
    assert upstream.may_admit(198) is None
    refusal = upstream.may_admit(199)
    assert refusal is not None and not refusal
    assert (refusal.reason, refusal.need, refusal.free) == ("pages", 199, 200)
    assert exact.may_admit(200) is None
    assert exact.may_admit(201) is not None
    exact.reserve(1, 10)
    assert exact.may_admit(188) is None
    assert exact.may_admit(189) is not None


def test_append_rules_differ_only_when_no_group_is_needed() -> None:
    """Upstream refuses a decode whenever nothing is free; exact only if that decode needs a group."""
    for rule, inside in ((UPSTREAM, False), (EXACT, True)):
        ledger = KvLedger(2, lambda t: -(-t // 16), dataclasses.replace(rule, watermark=0.0))
        ledger.reserve(1, 17)
        assert ledger.free_groups == 0
        assert ledger.may_append(1, 18) is inside
        assert ledger.may_append(1, 33) is False


def test_context_reservation_never_grows_and_has_no_watermark() -> None:
    """orca and faster_transformer: every sequence takes groups(max_model_len), whatever it holds."""
    ledger = KvLedger(400, lambda t: -(-t // 16), UPSTREAM)
    ledger.bind(limit_tokens=1600, reserve_context=True)
    for seq_id in range(4):
        assert ledger.may_admit(1) is None
        assert ledger.reserve(seq_id, 1) == 1600
    refusal = ledger.may_admit(1)
    assert refusal is not None and (refusal.need, refusal.free) == (100, 0)


def test_a_context_beyond_the_pool_is_refused_at_the_start() -> None:
    """Otherwise such a policy would wait for ever."""
    with pytest.raises(ConfigError, match="1601 tokens = 101 groups"):
        KvLedger(100, lambda t: -(-t // 16)).bind(limit_tokens=1601, reserve_context=True)


def test_fit_tokens_is_what_one_sequence_can_reach() -> None:
    """The pool alone, less a watermark that is never waived, and never beyond the limit."""
    assert KvLedger(300, lambda t: -(-t // 16), EXACT).fit_tokens() == 4800
    assert KvLedger(300, lambda t: -(-t // 16), UPSTREAM).fit_tokens() == 297 * 16
    ledger = KvLedger(300, lambda t: -(-t // 16), EXACT)
    ledger.bind(limit_tokens=1000, reserve_context=False)
    assert ledger.fit_tokens() == 1000


def test_a_whole_reservation_leaves_room_for_the_largest_other() -> None:
    """So the oldest never needs the memory of a sequence that may not be preempted."""
    ledger = KvLedger(100, lambda t: t, dataclasses.replace(EXACT, watermark=0.0))
    ledger.reserve(1, 10)
    assert ledger.may_finish(60, 41) is not None
    assert ledger.may_finish(60, 40) is None
    ledger.reserve(2, 60, whole=True)
    assert ledger.may_finish(40, None) is None
    assert ledger.may_finish(41, None) is not None
    assert ledger.release(2) == 60
    assert ledger.whole_groups == 0


def test_withheld_groups_come_back() -> None:
    """A refusal by whoever maps memory: believe in nothing free, then in part, then in all."""
    ledger = KvLedger(10, lambda t: t, EXACT)
    ledger.reserve(1, 4)
    ledger.withhold()
    assert (ledger.free_groups, ledger.withheld_groups, ledger.reserved_groups) == (0, 6, 4)
    ledger.check({1: 4})
    ledger.restore(2)
    assert (ledger.free_groups, ledger.withheld_groups) == (2, 4)
    ledger.release(1)
    ledger.restore()
    assert (ledger.free_groups, ledger.withheld_groups) == (10, 0)


def test_misuse_is_an_invariant_error() -> None:
    """Twice the same holder, more than there is, a stranger, and books that do not match."""
    ledger = KvLedger(4, lambda t: t, EXACT)
    ledger.reserve(1, 3)
    with pytest.raises(InvariantError, match="holds memory already"):
        ledger.reserve(1, 1)
    with pytest.raises(InvariantError, match="2 groups, 1 are free"):
        ledger.reserve(2, 2)
    with pytest.raises(InvariantError, match="lacks 2 groups, 1 are free"):
        ledger.grow(1, 5)
    with pytest.raises(InvariantError, match="in use"):
        ledger.bind(limit_tokens=9, reserve_context=False)
    for books in ({}, {2: 1}, {1: 4}):
        with pytest.raises(InvariantError):
            ledger.check(books)
    with pytest.raises(ConfigError, match="total_groups=0"):
        KvLedger(0, lambda t: t)


def test_presets_are_found_by_name() -> None:
    """The flag's choices."""
    assert ADMISSION_RULES == {"upstream": UPSTREAM, "exact": EXACT}
