"""A5: known plaintext. The attacker knows a request's first tokens, fits the map and inverts it on the rest.

It uses values of layer 0, where a token's plain row is public. A key that changes every segment is fitted per segment.
"""

from __future__ import annotations

import torch

from scripts.scx_attacks.public import PublicModel, Rows
from scripts.scx_attacks.rows import norms
from scripts.scx_attacks.view import Guess, View, match

RIDGE = 1e-5
ROUNDS = 8


def _ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The map W that takes rows x (m, D) to y (m, D), least squares with a little damping. Returns (D, D)."""
    gram = x.T @ x
    damp = RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(gram.shape[0], dtype=gram.dtype)
    return torch.linalg.solve(gram + damp, x.T @ y)


def _pair(cost: torch.Tensor) -> torch.Tensor:
    """Rows to columns of a square cost matrix, cheapest pair first. Returns (m,) the column of each row."""
    cost = cost.clone()
    chosen = torch.empty(cost.shape[0], dtype=torch.int64)
    for _ in range(cost.shape[0]):
        at = int(cost.argmin())
        row, column = divmod(at, cost.shape[1])
        chosen[row] = column
        cost[row], cost[:, column] = torch.inf, torch.inf
    return chosen


def _unshuffle(view: View, plain_k: torch.Tensor, plain_v: torch.Tensor, head: int, known: int) -> torch.Tensor:
    """Which known token each known row of a sealed view is, for one head: first by norms, then by fitting in turns.

    plain_k, plain_v: (known, G, D). Returns (known,) indices into the known tokens.
    """
    order = torch.arange(known)
    seen = norms(view.k[:known], view.v[:known])[:, head]
    mine = norms(plain_k, plain_v)[:, head]
    seen, mine = seen / seen.mean(0), mine / mine.mean(0)
    y, x = view.v[:known, head], plain_v[:, head]
    cost = torch.cdist(seen, mine)
    for turn in range(ROUNDS):
        for first, last in view.blocks:
            if last <= known:
                order[first:last] = first + _pair(cost[first:last, first:last])
        if turn + 1 < ROUNDS:
            cost = torch.cdist(y @ _ridge(y, x[order]), x)
    return order


def known_plaintext(model: PublicModel, view: View, prefix: torch.Tensor) -> Guess:
    """A5: fit W on the rows of `prefix` (m,), m >= 0, and look every row up behind W; per segment where keys change.

    Candidates are seen through the same subspace as the fit: with fewer than D known rows the map is known only there.
    Rows of segments without a known token are looked up as they are. In a sealed view only whole blocks help, since
    the order within a block comes from fitting it. Only rows m.. of the answer mean anything.
    """
    rows = model.first_rows()
    guess = match(view, view.v, rows.v)
    span = view.rules.segment_tokens or view.tokens
    for first in range(0, len(prefix), span):
        last = min(first + span, view.tokens)
        part = view.part(first, last)
        known = min(len(prefix), last) - first
        if view.rules.seal_tokens:
            known -= known % view.rules.seal_tokens
        if known:
            guess.distance[first:last] = _segment(part, rows, prefix[first : first + known])
    return guess


def _segment(part: View, rows: Rows, prefix: torch.Tensor) -> torch.Tensor:
    """One key's rows, mapped back as well as the known ones allow, and their distances (n, V) to the vocabulary's."""
    known = len(prefix)
    seen, through = torch.empty_like(part.v), torch.empty_like(rows.v)
    for head in range(part.v.shape[1]):
        x, y = rows.v[prefix, head], part.v[:known, head]
        if part.rules.seal_tokens:
            x = x[_unshuffle(part, rows.k[prefix], rows.v[prefix], head, known)]
        seen[:, head] = part.v[:, head] @ _ridge(y, x)
        through[:, head] = rows.v[:, head] @ _ridge(x, x)
    return match(part, seen, through).distance
