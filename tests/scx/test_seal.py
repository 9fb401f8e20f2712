"""Sealed KV opens where it was sealed and nowhere else; what was touched does not open."""

from __future__ import annotations

import dataclasses

import pytest

from engine.core.errors import InvariantError
from engine.scx.keys import Scope, Secret, SessionKeys
from engine.scx.seal import OVERHEAD_BYTES, SALT_BYTES, KvPlace, KvSealer, SealError

PLACE = KvPlace(model=b"tiny", layer=3, first=64, last=96, epoch=2, side="k")
PLAIN = bytes(range(256)) * 3
ROOT = bytes(range(32))


def sealer(nonce: bytes = b"session-1", tenant: bytes = b"", epoch: int = 0) -> KvSealer:
    keys = SessionKeys(Secret(bytearray(ROOT)), nonce, Scope(b"tiny", "perm"), tenant=tenant, epoch=epoch)
    return KvSealer(keys)


def test_round_trip_also_by_another_process_with_the_root() -> None:
    """The same session derived again opens what the first sealed; empty bytes are a message like others."""
    sealed = sealer().seal(PLACE, PLAIN)
    assert len(sealed) == len(PLAIN) + OVERHEAD_BYTES
    assert PLAIN[:16] not in sealed
    assert sealer().open(PLACE, sealed) == PLAIN
    assert sealer().open(PLACE, sealer().seal(PLACE, b"")) == b""


@pytest.mark.parametrize("field, value", [
    ("model", b"tinz"), ("model", b""), ("layer", 4), ("first", 63), ("last", 97), ("epoch", 3), ("side", "v"),
])  # fmt: skip
def test_every_bound_field(field: str, value: object) -> None:
    """Brought to another place, whichever field differs, it is refused."""
    sealed = sealer().seal(PLACE, PLAIN)
    with pytest.raises(SealError):
        sealer().open(dataclasses.replace(PLACE, **{field: value}), sealed)  # type: ignore[arg-type]


def test_places_cannot_run_into_each_other() -> None:
    """A model identity that looks like the beginning of the numbers gives other associated bytes."""
    same = [KvPlace(b"a", 1, 2, 3, 4), KvPlace(b"a\0", 1, 2, 3, 4), KvPlace(b"a", 1, 2, 3, 4, side="k"),
            KvPlace(b"", 0x61, 1, 2, 3)]  # fmt: skip
    assert len({place.associated() for place in same}) == len(same)


@pytest.mark.parametrize("other", [{"nonce": b"session-2"}, {"tenant": b"x"}, {"epoch": 1}])
def test_another_session(other: dict[str, object]) -> None:
    """Another session, tenant or key epoch cannot open it."""
    sealed = sealer().seal(PLACE, PLAIN)
    with pytest.raises(SealError):
        sealer(**other).open(PLACE, sealed)  # type: ignore[arg-type]


def test_tampering() -> None:
    """Any byte changed (version, salt, text or tag), any truncation, anything appended: refused."""
    box = sealer()
    sealed = box.seal(PLACE, PLAIN)
    for at in [0, 1, SALT_BYTES, SALT_BYTES + 1, len(sealed) // 2, len(sealed) - 17, len(sealed) - 1]:
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(SealError):
            box.open(PLACE, bytes(changed))
    for length in [0, 1, SALT_BYTES, OVERHEAD_BYTES - 1, OVERHEAD_BYTES, len(sealed) - 16, len(sealed) - 1]:
        with pytest.raises(SealError):
            box.open(PLACE, sealed[:length])
    with pytest.raises(SealError):
        box.open(PLACE, sealed + b"\0")


def test_halves_of_two_seals_do_not_mix() -> None:
    """The salt of one seal with the text of another, both of the same place, is refused."""
    box = sealer()
    one, two = box.seal(PLACE, PLAIN), box.seal(PLACE, PLAIN)
    with pytest.raises(SealError):
        box.open(PLACE, one[: 1 + SALT_BYTES] + two[1 + SALT_BYTES :])


def test_no_key_and_nonce_twice() -> None:
    """The same bytes for the same place again: other salt, other text. The nonce is fixed, so the salt must differ."""
    box = sealer()
    several = [box.seal(PLACE, PLAIN) for _ in range(64)]
    assert len({sealed[1 : 1 + SALT_BYTES] for sealed in several}) == 64
    assert len({sealed[1 + SALT_BYTES :][:32] for sealed in several}) == 64


def test_cleared() -> None:
    """A cleared sealer does nothing more, and says nothing of its key."""
    box = sealer()
    sealed = box.seal(PLACE, PLAIN)
    box.clear()
    box.clear()
    for act in (lambda: box.seal(PLACE, PLAIN), lambda: box.open(PLACE, sealed)):
        with pytest.raises(InvariantError, match="cleared"):
            act()
    assert repr(box) == "<KvSealer>"


@pytest.mark.parametrize("bad", [{"layer": -1}, {"first": 96}, {"last": 1 << 32}, {"epoch": -1}, {"side": "q"}])
def test_impossible_places(bad: dict[str, object]) -> None:
    """A place that cannot be is refused with its value before anything is sealed."""
    with pytest.raises(ValueError):
        dataclasses.replace(PLACE, **bad)  # type: ignore[arg-type]
