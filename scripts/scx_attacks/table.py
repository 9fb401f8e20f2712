"""Every attack on every scheme: the leakage table of one model.

It asks a `capture` function for views and scores the attacks' answers with the true tokens; it knows neither keys nor
the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scripts.scx_attacks import collision, known, link, rows, scores
from scripts.scx_attacks.public import PublicModel, Rows
from scripts.scx_attacks.view import Guess, Rules, Score, View, places, score

# rules, the prompts' tokens -> for each prompt, under a key of its own, the view of each layer asked for
Capture = Callable[[Rules, Sequence[torch.Tensor]], list[dict[int, View]]]


@dataclass(frozen=True, slots=True)
class Probe:
    """What is attacked with. prompts: each (n,) ids, all of one length, n > 2 D. deep: the layer of A6 and A9.

    pairs: of requests with the first prompt under two keys, for A9 by raw rows.
    positions, pool: A6 tries, at each of these positions, the true token and pool - 1 others drawn from the
    vocabulary; 0 = the whole vocabulary.
    """

    prompts: list[torch.Tensor]
    deep: int
    positions: range
    pool: int = 0
    pairs: int = 1


@dataclass(slots=True)
class Row:
    """One scheme. recovery: attack -> Score; rates: measure -> (value, chance). linked_rows: rows of A9 by raw."""

    rules: Rules
    recovery: dict[str, Score] = field(default_factory=dict)
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    linked_rows: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rules": asdict(self.rules), "recovery": {name: asdict(one) for name, one in self.recovery.items()},
                "rates": {name: {"value": v, "chance": c} for name, (v, c) in self.rates.items()}}  # fmt: skip


class Table:
    """Measures one scheme after the other; what is the same for all of them is computed once."""

    def __init__(self, model: PublicModel, probe: Probe) -> None:
        self.model, self.probe = model, probe
        generator = torch.Generator().manual_seed(0)
        truth, count = probe.prompts[0], probe.pool or model.vocab
        pools = []
        for at in probe.positions:  # column 0 is the true token; the attack does not know, and ties count against it
            others = torch.randperm(model.vocab, generator=generator)
            pools.append(torch.cat([truth[at : at + 1], others[others != truth[at]][: count - 1]]))
        self._pools = torch.stack(pools)
        self._tried: list[Rows] = collision.candidate_rows(model, truth, probe.deep, probe.positions, self._pools)

    def row(self, rules: Rules, capture: Capture) -> Row:
        """All attacks on one scheme. The first prompt is captured again, for A9 and the alarm."""
        found, count = Row(rules), len(self.probe.prompts)
        captured = capture(rules, [*self.probe.prompts, *[self.probe.prompts[0]] * self.probe.pairs])
        views, others = captured[:count], captured[count:]
        self._rows(found, [view[0] for view in views])
        self._collisions(found, views[0][self.probe.deep])
        self._relations(found, views[0], others)
        return found

    def _score(self, views: list[View], attack: Callable[[View, torch.Tensor], Guess], start: int = 0) -> Score:
        """An attack on every prompt's view; tokens from `start` on count."""
        each = [places(attack(view, truth), truth)[start:] for view, truth in zip(views, self.probe.prompts)]
        return score(each, max(1, views[0].rules.seal_tokens) / self.model.vocab)

    def _rows(self, found: Row, views: list[View]) -> None:
        """A1-A5 and A7, at layer 0."""
        model, out = self.model, found.recovery
        out["A1 V"] = self._score(views, lambda view, _: rows.nearest_value(model, view))
        if not found.rules.seal_tokens:  # a sealed row's position is not known
            out["A1 K"] = self._score(views, lambda view, _: rows.nearest_key(model, view))
        for name, attack in (("A2", rows.sorted_values), ("A3", rows.sorted_magnitudes)):
            out[name] = self._score(views, lambda view, _, by=attack: by(model, view))  # type: ignore[misc]
            out[f"{name} shape"] = self._score(
                views[:1], lambda view, _, by=attack: by(model, view, shape_only=True)  # type: ignore[misc]
            )  # fmt: skip
        lengths = (rows.norm_fingerprint, rows.scaled_norms)
        out["A4"] = best(self._score(views, lambda view, _, by=by: by(model, view)) for by in lengths)  # type: ignore[misc]
        self._known(found, views)
        out["A7 self"] = self._score(views, lambda view, _: scores.self_scores(model, view))
        out["A7"] = self._score(views[:1], lambda view, _: scores.pairwise_scores(model, view))

    def _known(self, found: Row, views: list[View]) -> None:
        """A5 with prefixes of four lengths, and where keys change, with the first half of each segment known."""
        model, dim, size = self.model, self.model.spec.head_dim, found.rules.segment_tokens
        for name, count in (("0", 0), ("D/4", dim // 4), ("D", dim), ("2D", 2 * dim)):
            found.recovery[f"A5 {name}"] = self._score(
                views, lambda view, truth, m=count: known.known_plaintext(model, view, truth[:m]), count  # type: ignore[misc]
            )  # fmt: skip
        if not size or found.rules.seal_tokens:
            return
        each = []
        for view, truth in zip(views, self.probe.prompts):
            for first in range(0, view.tokens - size + 1, size):
                part, mine = view.part(first, first + size), truth[first : first + size]
                guess = known.known_plaintext(model, part, mine[: size // 2])
                each.append(places(guess, mine)[size // 2 :])
        found.recovery["A5 half"] = score(each, 1 / model.vocab)

    def collide(self, view: View, feature: str) -> Guess:
        """A6 on a view of the deep layer of the first prompt; column 0 of the answer is the true token."""
        return collision.collide(view, self._tried, self.probe.positions, feature)

    def _collisions(self, found: Row, view: View) -> None:
        """A6 by each invariant; the best of them is the attack."""
        first = torch.zeros(len(self.probe.positions), dtype=torch.int64)
        each = {}
        for feature in collision.FEATURES:
            each[feature] = score([places(self.collide(view, feature), first)], 1 / self._pools.shape[1])
        found.recovery["A6"] = best(each.values())

    def _relations(self, found: Row, one: dict[int, View], others: Sequence[dict[int, View]]) -> None:
        """A8 at layer 0, A9 at the deep layer. All requests have the first prompt; by raw rows A9 takes every pair."""
        other = others[0]
        precision, recall = link.equal_pairs(one[0], self.probe.prompts[0])
        found.rates["A8 precision"] = precision, 0.0
        found.rates["A8 recall"] = recall, 0.0
        found.rates["A8 reuse"] = link.reuse_share(one[0], other[0]), 0.0
        deep = self.probe.deep
        for by in link.LINKS:
            tried = others if by == "raw" else others[:1]
            rate = sum(link.link_rate(one[deep], each[deep], by) for each in tried) / len(tried)
            found.rates[f"A9 {by}"] = rate, link.link_chance(one[deep])
        found.linked_rows = len(others) * one[deep].tokens


def best(some: Iterable[Score]) -> Score:
    """The Score with the highest recovery."""
    return max(some, key=lambda one: one.top1)
