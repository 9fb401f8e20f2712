"""What the table must show, or the run fails: attacks that do not work on plain rows are broken attacks, a scheme that
leaks more than it should is a broken scheme, and what is expected to fall must be seen to fall.

It reads a table; it measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scripts.scx_attacks.capture import PLAIN
from scripts.scx_attacks.table import Row

WORKS = 0.99  # of an attack on what it is made for
CHANCE_FACTOR = 5
LINK_FACTOR = 2  # of chance, for A9 by raw rows
LENGTHS_SEEP = 0.05  # A2 and A3 compare rows with their lengths, which a rotation keeps
LENGTHS_MIXED = 0.10  # A4 against maps that stretch
SEGMENTED = 0.05  # A5 where the known tokens fill other segments
SHARED_KEY = "perm-static"
PERMUTED = ("sorted", "norms", "gram")
LINKABLE = {"perm-static": PERMUTED, "perm": PERMUTED, "rotate": ("norms", "gram"), "mix": ()}  # besides "projection"


def near_chance(chance: float, samples: int, factor: float = CHANCE_FACTOR) -> float:
    """The largest rate that passes for chance: `factor` times as much (or 0.05 more, where that is less), three
    standard deviations of a sample and one hit."""
    hits = min(factor * chance, chance + 0.05) * samples
    return (hits + 3 * math.sqrt(hits) + 1) / samples


def problems(rows: Iterable[Row]) -> list[str]:
    """One line a gate that does not hold."""
    found: list[str] = []
    for row in rows:
        found += [f"{row.rules.label}: {line}" for line in _of(row)]
    return found


def _of(row: Row) -> list[str]:
    if row.rules.scheme == PLAIN:
        return _plain(row)
    found = [f"{name} recovers {one.top1:.1%}; every exact scheme falls to it" for name in ("A7 self", "A7")
             if (one := row.recovery[name]).top1 < WORKS]  # fmt: skip
    return found + _tokens(row) + _relations(row)


def _plain(row: Row) -> list[str]:
    found = [f"{name} recovers only {one.top1:.1%} of plain rows: the attack is broken"
             for name, one in row.recovery.items() if one.top1 < WORKS]  # fmt: skip
    return found + [f"{name} is only {value:.1%} on plain rows: the attack is broken"
                    for name, (value, _) in row.rates.items() if value < WORKS]  # fmt: skip


def _tokens(row: Row) -> list[str]:
    """What a scheme may let through, by A1-A5."""
    limits: dict[str, float] = {}
    at_chance = ["A1 V", "A1 K"]
    if row.rules.scheme not in ("perm-static", "perm"):
        at_chance += ["A2 shape", "A3 shape"]
        limits |= {"A2": LENGTHS_SEEP, "A3": LENGTHS_SEEP}
    if row.rules.scheme == "mix":
        limits["A4"] = LENGTHS_MIXED
    if row.rules.segment_tokens:
        limits |= {f"A5 {count}": SEGMENTED for count in ("0", "D/4", "D", "2D")}
    limits |= {name: near_chance(one.chance, one.tokens) for name in at_chance if (one := row.recovery.get(name))}
    return [f"{name} recovers {row.recovery[name].top1:.2%}, more than {limit:.2%}"
            for name, limit in limits.items() if row.recovery[name].top1 > limit]  # fmt: skip


def _relations(row: Row) -> list[str]:
    """A8's alarm and A9."""
    reuse = row.rates["A8 reuse"][0]
    raw, chance = row.rates["A9 raw"]
    if row.rules.scheme == SHARED_KEY:
        found = [f"one key for all requests, and {name} sees only {value:.1%} equal rows"
                 for name, value in (("A8", reuse), ("A9 raw", raw)) if value <= WORKS]  # fmt: skip
    else:
        found = [] if reuse == 0 else [f"A8 sees {reuse:.2%} equal rows in two requests with keys of their own"]
        if raw > (limit := near_chance(chance, row.linked_rows, LINK_FACTOR)):
            found.append(f"A9 links {raw:.1%} of raw rows, more than {limit:.1%}")
    if row.rules.segment_tokens:
        return found
    for by in (*LINKABLE[row.rules.scheme], "projection"):
        if (rate := row.rates[f"A9 {by}"][0]) < 0.9:
            found.append(f"A9 links only {rate:.1%} by {by}, which the map keeps")
    return found
