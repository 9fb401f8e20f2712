"""A7: the observer of a live device (V3). Whoever sees q' and k' sees the exact scores q.k, whatever the encoding.

A token's score with itself does not depend on its position (both are rotated alike), so H numbers identify it; scores
with tokens found before settle what is left. This works against every exact encoding and is expected to.
"""

from __future__ import annotations

import torch

from scripts.scx_attacks.public import PublicModel, rotate
from scripts.scx_attacks.view import Guess, View, square_distance

SHORTLIST = 64
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
    group = view.q.shape[1] // view.live_k.shape[1]
    span = view.rules.segment_tokens or view.tokens
    distance = first.distance + FAR
    found = torch.empty(view.tokens, dtype=torch.int64)
    for at in range(view.tokens):
        short = first.distance[at].topk(min(SHORTLIST, model.vocab), largest=False).indices  # (m,)
        start = at // span * span
        total = first.distance[at, short]
        if at > start:
            q = rotate(rows.q[short], model.rope[at : at + 1])  # (m, H, D)
            k = rotate(rows.k[found[start:at]], model.rope[start:at]).repeat_interleave(group, 1)  # (j, H, D)
            guess = torch.einsum("mhd,jhd->mjh", q, k)
            seen = torch.einsum("hd,jhd->jh", view.q[at], view.live_k[start:at].repeat_interleave(group, 1))
            unit = guess.std() + 1e-6
            total = total + ((guess - seen) / unit).pow(2).mean((1, 2))
        distance[at, short] = total
        found[at] = short[total.argmin()]
    return Guess(distance, first.bag)
