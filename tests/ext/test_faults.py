"""Every driver verb fails at its 1st, 2nd, 3rd ... call until a whole run succeeds: nothing breaks, nothing leaks.

The run grows, shares, looks ahead, shrinks, steals and reclaims, so that each verb fails in each of its places.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.ext.support import assert_clean, committed_bytes, geometry, groups, make, own_maps

MOST_CALLS = 2000  # far more than the run makes: a bound for the loop below


def attempt(kv: Any, name: str, *arguments: Any) -> Any:
    """One call; where it is refused, what is in use and every slot's tokens must be as before."""
    before = kv.stats()
    tokens = [kv.tokens(slot) for slot in range(4)]
    result = getattr(kv, name)(*arguments)
    kv.check()
    after = kv.stats()
    groups(after)
    if result is not None and not result and name in ("ensure", "share"):
        assert after.in_use_groups == before.in_use_groups
        assert [kv.tokens(slot) for slot in range(4)] == tokens
        assert result.reason in ("driver", "pages")
    return result


def run(kv: Any) -> None:
    """Every way in which a page can move. Whatever was refused is simply left out."""
    a, b, c = (kv.acquire(0) for _ in range(3))
    attempt(kv, "ensure", a, 35)
    attempt(kv, "share", a, b, min(3, kv.geometry.shareable_groups(kv.tokens(a))))
    attempt(kv, "ensure", b, 45)
    ticket = attempt(kv, "look_ahead", [(c, 30)])
    assert ticket.wait(30)
    attempt(kv, "ensure", c, 20)
    attempt(kv, "set_tokens", b, min(kv.tokens(b), 12))
    attempt(kv, "trim", c, min(kv.tokens(c), 5))
    attempt(kv, "release", a)
    attempt(kv, "ensure", c, 50)  # takes what a kept
    attempt(kv, "release", b)
    d = kv.acquire(20)
    if isinstance(d, int):
        attempt(kv, "ensure", d, 20)
        attempt(kv, "look_ahead", [(d, 50)]).wait(30)
        attempt(kv, "release", d)
    attempt(kv, "reclaim", 1)
    attempt(kv, "release", c)


@pytest.mark.parametrize(
    ("layout", "times"), [("mega", 1), ("mega", 2), ("mega", -1), ("per_layer", 1), ("per_layer", 2)]
)
@pytest.mark.parametrize("kind", ["model", "fault", "fault_cuda"])
@pytest.mark.parametrize("verb", ["create", "destroy", "map", "allow", "unmap", "any"])
def test_nth_failure_of_every_verb(kind: str, layout: str, verb: str, times: int) -> None:
    """n = 1, 2, ... until nothing failed any more. Afterwards one reclaim heals all, and closing returns all."""
    fired = []
    for nth in range(1, MOST_CALLS):
        kv = make(kind, geometry(layout), pool_groups=8)
        kv.fail_at(verb, nth, times)
        run(kv)
        fired.append(kv.faults_fired)
        kv.fail_at(verb, 0)
        quarantined = kv.stats().quarantined_groups
        kv.reclaim(0)
        assert groups(kv.stats()) == {"free": 8}, f"{quarantined} were quarantined"
        slot = kv.acquire(50)
        assert isinstance(slot, int) and kv.ensure(slot, 50) is None, "a healed allocator works"
        if kind == "fault":
            stats = kv.stats()
            assert own_maps(stats, kv)[0] == committed_bytes(stats) == 5 * kv.geometry.group_bytes
        kv.close()
        kv.check()
        assert kv.stats().physical_bytes == 0
        if fired[-1] == 0:
            break
    del kv
    assert_clean(kind)
    assert fired[-1] == 0 and len(fired) > 5, "the verb must have failed in many places, and at last in none"


@pytest.mark.parametrize("kind", ["model", "fault", "fault_cuda"])
def test_failed_unmap_quarantines_and_counts(kind: str) -> None:
    """A page whose unmap failed is not used again until an unmap worked; the slot is not handed out meanwhile."""
    kv = make(kind, geometry(slots=2), pool_groups=6)
    a = kv.acquire(0)
    kv.ensure(a, 50)
    kv.fail_at("unmap", 1, 2)  # both planes of the last group
    kv.trim(a, 40)
    stats = kv.stats()
    assert groups(stats) == {"free": 1, "in_use": 4, "quarantined": 1}
    assert (stats.failed_unmaps, stats.quarantined_positions) == (1, 1)
    kv.fail_at("unmap", 1)
    refusal = kv.ensure(a, 50)
    assert refusal is not None and refusal.reason == "driver", "the place is still in doubt"
    kv.release(a)
    assert kv.acquire(0) != a and not kv.acquire(0)
    kv.fail_at("any", 0)
    kv.reclaim(0)
    assert groups(kv.stats()) == {"free": 6}
    assert kv.acquire(0) == a
    kv.close()


@pytest.mark.parametrize("kind", ["model", "fault", "fault_cuda"])
def test_memory_taken_by_others_is_replaced_by_kept_pages(kind: str) -> None:
    """The books say a page is free and the system has none: kept pages are taken instead, then look-ahead."""
    kv = make(kind, geometry(), pool_groups=10)
    a, b = kv.acquire(0), kv.acquire(0)
    kv.ensure(a, 30)
    kv.release(a)
    kv.fail_at("create", 1, -1)
    assert kv.ensure(b, 30) is None
    assert groups(kv.stats()) == {"free": 7, "in_use": 3}
    refusal = kv.ensure(b, 40)
    assert refusal is not None and (refusal.reason, refusal.free_groups) == ("driver", 7)
    kv.close()


@pytest.mark.parametrize("kind", ["model", "fault"])
@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_opening_fails_whole(kind: str, layout: str) -> None:
    """Addresses refused for the nth plane: an error that says so, and no descriptor or range stays behind."""
    before = sorted(os.listdir("/proc/self/fd"))
    planes = geometry(layout).planes
    for nth in range(1, planes + 1):
        with pytest.raises(RuntimeError, match="addresses"):
            make(kind, geometry(layout), pool_groups=4, fault=("reserve", nth, 1))
    assert sorted(os.listdir("/proc/self/fd")) == before
    make(kind, geometry(layout), pool_groups=4, fault=("reserve", planes + 1, 1)).close()


@pytest.mark.parametrize("verb", ["unmap", "destroy", "unreserve", "any"])
def test_closing_never_fails(verb: str) -> None:
    """Whatever the driver refuses while closing, close() ends, twice, and the descriptor is gone."""
    before = sorted(os.listdir("/proc/self/fd"))
    for nth in range(1, 25):
        kv = make("fault", geometry(), pool_groups=8)
        a, b = kv.acquire(0), kv.acquire(0)
        kv.ensure(a, 35)
        kv.share(a, b, 3)
        kv.fail_at(verb, nth, -1)
        kv.close()
        kv.close()
        del kv
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_only_the_fault_driver_injects() -> None:
    """A production driver has no such switch."""
    kv = make("memfd", geometry(), pool_groups=4)
    with pytest.raises(ValueError, match="fault"):
        kv.fail_at("map", 1)
    with pytest.raises(ValueError, match="unknown"):
        make("rocm", geometry(), pool_groups=4)
    kv.close()
