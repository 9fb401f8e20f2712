"""A7: the observer of a live device (V3). Whoever sees q' and k' sees the exact scores q.k, whatever the encoding.

A token's score with itself does not depend on its position (both are rotated alike), so H numbers identify it; scores
with tokens found before settle what is left. This works against every exact encoding and is expected to.
"""

from __future__ import annotations

import torch

from scripts.scx_attacks.public import PublicModel, rotate
from scripts.scx_attacks.view import Guess, View, square_distance

CANDIDATES = 32
FAR = 1e9


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Row by row and query head by query head. q: (n, H, D); k: (n, G, D). Returns (n, H)."""
    return (q * k.repeat_interleave(q.shape[1] // k.shape[1], 1)).sum(-1)


def self_scores(model: PublicModel, view: View) -> Guess:
    """A7, first part: q_p.k_p per query head, against the vocabulary's."""
    assert view.q is not None and view.live_k is not None
    rows = model.first_rows()
    known = _scores(rows.q, rows.k)
    unit = known.std(0, keepdim=True)
    distance = square_distance(_scores(view.q, view.live_k) / unit, known / unit)
    return Guess(distance, torch.ones(view.tokens, dtype=torch.int64))


def pairwise_scores(model: PublicModel, view: View) -> Guess:
    """A7 whole: the shortlist of self_scores, put in order by the scores with the tokens found before.

    Under keys per segment only pairs within a segment can be compared.
    """
    assert view.q is not None and view.live_k is not None
    first = self_scores(model, view)
    rows = model.first_rows()
    spread = lambda k: k.repeat_interleave(view.q.shape[1] // k.shape[1], 1).transpose(0, 1)  # type: ignore[union-attr]  # noqa: E731
    live = spread(view.live_k)  # (H, n, D)
    guessed = torch.zeros_like(live)  # the keys of the tokens found so far, rotated
    span = view.rules.segment_tokens or view.tokens
    distance = first.distance + FAR
    for at in range(view.tokens):
        short = first.distance[at].topk(min(CANDIDATES, model.vocab), largest=False).indices  # (m,)
        total, start = first.distance[at, short], at // span * span
        if at > start:
            q = rotate(rows.q[short], model.rope[at : at + 1]).transpose(0, 1)  # (H, m, D)
            mine = q @ guessed[:, start:at].mT  # (H, m, j)
            seen = view.q[at][:, None] @ live[:, start:at].mT  # (H, 1, j)
            total = total + ((mine - seen) / (mine.std() + 1e-6)).pow(2).mean((0, 2))
        distance[at, short] = total
        best = short[total.argmin()][None]
        guessed[:, at] = spread(rotate(rows.k[best], model.rope[at : at + 1]))[:, 0]
    return Guess(distance, first.bag)
