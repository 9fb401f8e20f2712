"""What the allocator promises, one promise a test: on the model, Linux memory, the fault driver and CUDA on its fake.

tests/gpu/test_allocator.py runs the same tests on a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ext.support import KINDS, LINUX, assert_clean, geometry, groups, make, page_bytes_of
from vattention_ext import KvGeometry, OutOfPages, OutOfSlots

Open = Callable[..., Any]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which allocator."""
    return str(request.param)


@pytest.fixture
def open_kv(kind: str) -> Iterator[Open]:
    """Opens an allocator of the kind; checks and closes what a test opened."""
    opened = []

    def opener(layout: str = "mega", slots: int = 4, **settings: Any) -> Any:
        kv = make(kind, geometry(layout, slots, page_bytes=page_bytes_of(kind)), **settings)
        opened.append(kv)
        return kv

    yield opener
    while opened:
        kv = opened.pop()
        kv.check()
        kv.close()
        kv.check()
        assert kv.stats().free_groups == kv.stats().total_groups
        del kv
    assert_clean(kind)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_every_length_maps_exactly_the_groups_it_needs(open_kv: Open, layout: str) -> None:
    """ceil(tokens * b / S), also where a token straddles pages; growing never maps more, and repeating maps nothing."""
    kv = open_kv(layout, pool_groups=20)
    g = kv.geometry
    slot = kv.acquire(0)
    for tokens in range(51):
        assert kv.ensure(slot, tokens) is None
        need = math.ceil(tokens * g.token_bytes / g.page_bytes)
        assert groups(kv.stats()).get("in_use", 0) == need == g.groups_for(tokens)
        assert kv.mapped_tokens(slot) >= tokens == kv.tokens(slot)
        assert kv.stats().mapped_bytes == need * g.group_bytes
    calls = kv.stats().driver_calls
    kv.ensure(slot, 20)
    assert kv.tokens(slot) == 50, "ensure() never shrinks"
    assert kv.stats().driver_calls == calls


def test_acquire_maps_nothing_and_ends(open_kv: Open) -> None:
    """Slots are addresses only; with none left the answer is a falsy value, not an exception."""
    kv = open_kv(pool_groups=2)
    assert [kv.acquire(50) for _ in range(4)] == [0, 1, 2, 3]
    assert kv.stats().driver_calls["create"] == kv.stats().driver_calls["map"] == 0
    refusal = kv.acquire(1)
    assert refusal == OutOfSlots(4) and not refusal
    kv.release(2)
    assert kv.acquire(1) == 2


def test_refusal_names_numbers_and_changes_nothing(open_kv: Open) -> None:
    """A growth beyond the pool is refused with requested, free and total, and leaves no trace but the count."""
    kv = open_kv(pool_groups=6)
    a, b = kv.acquire(0), kv.acquire(0)
    assert kv.ensure(a, 40) is None  # 4 groups
    assert kv.ensure(b, 5) is None  # 1
    before = kv.stats()
    refusal = kv.ensure(b, 50)
    assert refusal == OutOfPages(requested_groups=4, free_groups=1, total_groups=6, reason="pages")
    assert not refusal
    after = kv.stats()
    assert (groups(after), after.driver_calls) == (groups(before), before.driver_calls)
    assert kv.tokens(b) == 5 and after.refusals == before.refusals + 1
    assert kv.ensure_many([(a, 41), (b, 50), (b, 10)]) == [1], "a refused one does not stop the rest"
    assert kv.tokens(b) == 10


def test_released_pages_stay_until_needed(open_kv: Open) -> None:
    """Deferred reclamation: release unmaps nothing; the same slot gets its pages back for no driver call."""
    kv = open_kv(pool_groups=10)
    slot = kv.acquire(30)
    kv.ensure(slot, 30)
    kv.release(slot)
    assert groups(kv.stats()) == {"free": 7, "kept": 3}
    calls = kv.stats().driver_calls
    assert kv.acquire(30) == slot
    kv.ensure(slot, 30)
    assert kv.stats().driver_calls == calls
    assert groups(kv.stats()) == {"free": 7, "in_use": 3}


def test_best_fit(open_kv: Open) -> None:
    """A new request gets the released slot with the fewest kept groups that suffice, else the one with the most."""
    kv = open_kv(pool_groups=20)
    slots = {tokens: kv.acquire(0) for tokens in (10, 21, 32, 50)}
    for tokens, slot in slots.items():
        kv.ensure(slot, tokens)
    for slot in slots.values():
        kv.release(slot)
    assert kv.acquire(15) == slots[21]
    assert kv.acquire(50) == slots[50]
    assert kv.acquire(50) == slots[32], "none suffices: the most"
    assert kv.acquire(0) == slots[10]


def test_needed_pages_come_from_the_longest_released(open_kv: Open) -> None:
    """First the pool, then kept groups in the order of release, then look-ahead of others; in-use pages never."""
    kv = open_kv(pool_groups=7)
    old, new, ahead, hungry = (kv.acquire(0) for _ in range(4))
    kv.ensure(new, 20)
    kv.ensure(old, 20)
    kv.release(old)
    kv.release(new)
    kv.ensure(ahead, 10)
    assert kv.look_ahead([(ahead, 30)]).wait(30)
    assert groups(kv.stats()) == {"in_use": 1, "look_ahead": 2, "kept": 4}
    kv.ensure(hungry, 10)
    assert kv.mapped_tokens(old) == 10 and kv.mapped_tokens(new) >= 20
    kv.ensure(hungry, 40)
    assert groups(kv.stats()) == {"in_use": 5, "look_ahead": 2}
    kv.ensure(hungry, 50)
    assert groups(kv.stats()) == {"in_use": 6, "look_ahead": 1}
    assert kv.ensure(hungry, 50) is None and kv.tokens(ahead) == 10
    assert kv.stats().stolen_groups == 5


def test_look_ahead_is_best_effort(open_kv: Open) -> None:
    """It maps what is free or kept, takes nothing from running slots, and its lack is not an error."""
    kv = open_kv(pool_groups=4)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 20)
    ticket = kv.look_ahead([(b, 50), (a, 30)])
    assert ticket.wait(30) and ticket.done
    stats = kv.stats()
    assert groups(stats) == {"in_use": 2, "look_ahead": 2}
    assert (stats.look_ahead_mapped, stats.look_ahead_given_up) == (2, 2)
    calls = stats.driver_calls
    assert kv.ensure(b, 20) is None
    assert kv.stats().driver_calls == calls, "pages mapped ahead cost nothing when they are needed"


def test_set_tokens_keeps_and_trim_gives_back(open_kv: Open) -> None:
    """set_tokens turns pages into look-ahead; trim returns them to the pool."""
    kv = open_kv(pool_groups=10)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    kv.set_tokens(slot, 15)
    assert groups(kv.stats()) == {"free": 5, "in_use": 2, "look_ahead": 3}
    kv.set_tokens(slot, 50)
    assert groups(kv.stats()) == {"free": 5, "in_use": 5}
    kv.trim(slot, 15)
    assert groups(kv.stats()) == {"free": 8, "in_use": 2}
    with pytest.raises(ValueError, match="ensure"):
        kv.set_tokens(slot, 50)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_shared_pages_are_counted_once_and_live_as_long_as_anyone(open_kv: Open, layout: str) -> None:
    """Sharing maps the same groups again, read-only; they go back when the last slot lets go, whoever made them."""
    kv = open_kv(layout, pool_groups=6)
    page = kv.geometry.group_bytes
    a, b, c = (kv.acquire(0) for _ in range(3))
    kv.ensure(a, 35)
    full = kv.geometry.shareable_groups(35)
    assert full == 3 and kv.geometry.groups_for(35) == 4
    assert kv.share(a, b, full) is None
    assert kv.share(a, c, 1) is None
    stats = kv.stats()
    assert groups(stats) == {"free": 2, "in_use": 4}
    assert (stats.shared_groups, stats.mapped_bytes, stats.shared_bytes) == (3, 4 * page, 4 * page)
    assert kv.tokens(b) == kv.geometry.tokens_in(3) == 32
    assert kv.ensure(b, 40) is None
    assert groups(kv.stats()) == {"free": 1, "in_use": 5}
    kv.release(a)
    stats = kv.stats()
    assert groups(stats) == {"free": 1, "in_use": 4, "kept": 1}, "the private group of a is kept, shared ones moved on"
    assert (stats.shared_groups, stats.mapped_bytes, stats.shared_bytes) == (1, 5 * page, page)
    kv.release(b)
    kv.release(c)
    assert kv.stats().shared_groups == 0
    kv.reclaim(0)
    assert groups(kv.stats()) == {"free": 6}


def test_shrinking_out_of_a_shared_page_leaves_it(open_kv: Open) -> None:
    """A slot that shrinks below shared groups loses them: what it maps beyond its tokens it may write."""
    kv = open_kv(pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 35)
    kv.share(a, b, 3)
    kv.set_tokens(b, 10)
    assert kv.stats().shared_groups == 1 and kv.mapped_tokens(b) == 10
    kv.set_tokens(a, 0)
    assert kv.stats().shared_groups == 0
    assert kv.mapped_tokens(a) == 0, "its head went to b, so nothing is mapped from the start"
    assert kv.ensure(a, 35) is None and kv.ensure(b, 35) is None


def test_reclaim_stops_at_the_floor(open_kv: Open) -> None:
    """reclaim() gives kept groups back down to the floor, or to what is asked."""
    kv = open_kv(pool_groups=12, floor_groups=2)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 50)
    kv.ensure(b, 30)
    kv.release(a)
    kv.release(b)
    assert kv.stats().kept_groups == 8
    assert kv.reclaim(7) == 1 and kv.mapped_tokens(b) >= 30, "the longest released gives first"
    assert kv.reclaim() == 5
    assert groups(kv.stats()) == {"free": 10, "kept": 2}
    assert kv.reclaim() == 0
    assert kv.reclaim(0) == 2
    assert groups(kv.stats()) == {"free": 12}


@pytest.mark.parametrize("kind", ["model", *LINUX], indirect=True)
@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_neighbours_are_one_mapping(open_kv: Open, layout: str) -> None:
    """Slots that grow in turns still cost two kernel mappings a plane each: one in use, one gap."""
    kv = open_kv(layout, pool_groups=20)
    slots = [kv.acquire(0) for _ in range(4)]
    for tokens in range(1, 35):
        assert kv.ensure_many([(slot, tokens) for slot in slots]) == []
    planes = kv.geometry.planes
    assert kv.stats().mappings == planes * 2 * 4


@pytest.mark.parametrize("kind", ["model", *LINUX], indirect=True)
def test_mapping_budget(open_kv: Open) -> None:
    """Opening refuses what can never fit; growing beyond the budget gives kept pages back first, then refuses."""
    with pytest.raises(ValueError, match="mappings"):
        open_kv(slots=4, pool_groups=10, max_mappings=12)
    kv = open_kv(slots=4, pool_groups=8, max_mappings=20)
    a, b, c, d = (kv.acquire(0) for _ in range(4))
    for slot in (a, c):
        kv.ensure(slot, 40)
    for slot in (c, a):
        kv.release(slot)
    # Page by page out of the end of another slot: file offsets run backwards, so nothing merges.
    refusals = [kv.ensure(slot, tokens) for tokens in range(1, 51) for slot in (b, d)]
    assert kv.stats().stolen_groups > 0 and kv.stats().mappings <= 20
    assert {r.reason for r in refusals if r is not None} == {"mappings"}, "all 8 groups are there, but not the mappings"
    assert kv.stats().kept_groups == 0, "kept pages were given up for their mappings first"
    kv.release(b)
    kv.release(d)
    kv.reclaim(0)
    assert kv.ensure(kv.acquire(0), 50) is None, "with fresh pages at home it fits again"


def test_misuse_is_named(open_kv: Open) -> None:
    """Wrong slots and counts are ValueErrors that change nothing; a closed allocator says so."""
    kv = open_kv(pool_groups=4)
    slot = kv.acquire(0)
    for call in (
        lambda: kv.ensure(3, 1), lambda: kv.ensure(-1, 1), lambda: kv.ensure(99, 1), lambda: kv.ensure(slot, 51),
        lambda: kv.ensure(slot, -1), lambda: kv.ensure_many([(slot, 10), (3, 1)]), lambda: kv.release(2),
        lambda: kv.look_ahead([(3, 1)]), lambda: kv.share(slot, slot, 0), lambda: kv.share(slot, 3, 0),
        lambda: kv.acquire(51), lambda: kv.trim(slot, 10), lambda: kv.reclaim(-1), lambda: kv.mapped_tokens(4),
    ):
        with pytest.raises(ValueError):
            call()
    assert groups(kv.stats()) == {"free": 4}
    kv.close()
    kv.close()
    assert kv.closed and kv.regions == []
    for call in (lambda: kv.ensure(slot, 1), lambda: kv.acquire(1), lambda: kv.reclaim(), lambda: kv.release(slot)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def until(met: Callable[[], bool], limit_s: float = 20) -> None:
    """Waits for what the mapper does by itself."""
    deadline = time.perf_counter() + limit_s
    while not met():
        assert time.perf_counter() < deadline, "the mapper did not do it"
        time.sleep(0.002)


def test_the_limit_changes_while_running(open_kv: Open) -> None:
    """A lower limit takes kept pages, then look-ahead, never pages in use; growth is refused until enough has ended."""
    kv = open_kv(pool_groups=12, floor_groups=1)
    a, b, c = (kv.acquire(0) for _ in range(3))
    for slot, tokens in ((a, 40), (b, 30), (c, 30)):
        kv.ensure(slot, tokens)
    kv.release(c)
    kv.set_tokens(b, 20)
    assert groups(kv.stats()) == {"free": 2, "in_use": 6, "look_ahead": 1, "kept": 3}
    kv.set_limit(7)
    until(lambda: kv.stats().over_limit_groups == 0)
    assert groups(kv.stats()) == {"in_use": 6, "look_ahead": 1}, "what is kept goes first, below the floor, too"
    kv.set_limit(4)
    until(lambda: kv.stats().over_limit_groups == 2)  # what was look-ahead counts until its memory has gone back
    stats = kv.stats()
    assert (stats.in_use_groups, stats.look_ahead_groups, stats.total_groups, stats.free_groups) == (6, 0, 4, 0)
    assert kv.tokens(a) == 40 and kv.tokens(b) == 20 and kv.mapped_tokens(a) >= 40
    refusal = kv.ensure(b, 30)
    assert refusal is not None and (refusal.reason, refusal.free_groups, refusal.total_groups) == ("pages", 0, 4)
    kv.check()
    kv.release(b)
    until(lambda: kv.stats().over_limit_groups == 0)
    assert groups(kv.stats()) == {"in_use": 4}
    kv.set_limit(20)
    assert kv.ensure(kv.acquire(0), 50) is None and groups(kv.stats()) == {"free": 11, "in_use": 9}
    with pytest.raises(ValueError):
        kv.set_limit(0)


def test_fences_are_steps(open_kv: Open) -> None:
    """A fence ends a step everywhere; where nothing runs beside the process it passes at once and costs no wait."""
    kv = open_kv(pool_groups=10)
    slot = kv.acquire(0)
    for tokens in range(1, 11):
        kv.ensure(slot, tokens)
        kv.fence(0)
    assert kv.stats().steps == len(kv.stalls_us()) == 10
    kv.fence()
    kv.release(slot)
    until(lambda: kv.reclaim(0) >= 0 and kv.stats().kept_groups == 0)
    assert groups(kv.stats()) == {"free": 10}


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"pool_groups": 0}, "pool_groups"), ({"pool_groups": 1, "floor_groups": 2}, "floor_groups"),
     ({"pool_groups": 1, "release_after_s": -1.0}, "release_after_s"),
     ({"pool_groups": 1, "release_after_s": math.nan}, "release_after_s"),
     ({"pool_groups": 1, "stock_groups": 2}, "stock_groups"),
     ({"pool_groups": 1, "max_mappings": 0}, "max_mappings")],
)
def test_pool_settings_are_checked(open_kv: Open, settings: dict[str, Any], word: str) -> None:
    """Errors name the setting."""
    with pytest.raises(ValueError, match=word):
        open_kv(**settings)


def test_geometry_numbers_and_refusals() -> None:
    """The settled sizes: SmolLM2 11,520 bytes a token and side, Llama-3-8B 65,536 (32 tokens a 2 MiB page)."""
    smol = KvGeometry(30, 3, 64, 2, 8192, 256)
    assert (smol.token_bytes, smol.planes, smol.group_bytes) == (11_520, 2, 4 << 20)
    assert smol.groups_for(182) == 1 and smol.groups_for(183) == 2 and smol.groups_for(8192) == smol.groups_per_slot
    llama = KvGeometry(32, 8, 128, 2, 8192, 16)
    assert llama.token_bytes == 65_536 and llama.groups_for(32) == 1 and llama.groups_for(33) == 2
    per_layer = KvGeometry(32, 8, 128, 2, 8192, 16, layout="per_layer")
    assert (per_layer.token_bytes, per_layer.planes, per_layer.group_bytes) == (2_048, 64, 128 << 20)
    for tokens in range(8193):
        g = smol.shareable_groups(tokens)
        assert smol.groups_for(smol.tokens_in(g)) == g
    with pytest.raises(ValueError, match="use at least 12288 or layout 'per_layer'"):
        KvGeometry(30, 3, 64, 2, 8192, 4, page_bytes=8192)
    for wrong in ({"layers": 0}, {"slots": True}, {"page_bytes": 5000}, {"layout": "paged"}, {"max_tokens": 1 << 31}):
        with pytest.raises(ValueError):
            KvGeometry(**{**{"layers": 2, "kv_heads": 1, "head_dim": 8, "element_bytes": 2, "max_tokens": 64,
                             "slots": 2}, **wrong})  # type: ignore[arg-type]


def test_kept_pages_expire(kind: str, open_kv: Open) -> None:
    """After release_after_s the mapper gives kept groups back, down to the floor, with nobody calling."""
    if kind == "model":
        pytest.skip("the model has no clock")
    kv = open_kv(pool_groups=10, release_after_s=0.05, floor_groups=1)
    slot = kv.acquire(0)
    kv.ensure(slot, 50)
    kv.release(slot)
    assert groups(kv.stats())["kept"] == 5
    deadline = time.perf_counter() + 20
    while kv.stats().kept_groups > 1 and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert groups(kv.stats()) == {"free": 9, "kept": 1}
    assert kv.stats().reclaimed_groups == 4
