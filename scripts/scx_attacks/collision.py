"""A6: collision by layer. Try candidates for the next token, run the model, compare what they would write.

At a deeper layer a row depends on all tokens before it, so tokens are found one after the other. Each step is given
the true tokens before it: an upper bound of what an attacker gets who has only its own answers, whose run ends at the
first mistake (Score.prefix).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scripts.scx_attacks.public import PublicModel, Rows
from scripts.scx_attacks.rows import norms
from scripts.scx_attacks.view import Guess, View, match

Feature = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FEATURES: dict[str, Feature] = {  # k, v: (n, G, D) -> (n, G, f)
    "raw": lambda k, v: torch.cat([k, v], -1),
    "sorted": lambda k, v: torch.cat([k.sort(-1).values, v.sort(-1).values], -1),
    "norms": norms,
}


def candidate_rows(
    model: PublicModel, truth: torch.Tensor, layer: int, positions: range, pools: torch.Tensor
) -> list[Rows]:
    """What every candidate would write at each position behind the true prefix; the costly part, and the same for
    every scheme. pools: (len(positions), m) candidate ids. Returns one Rows (m, ...) a position."""
    past, _ = model.forward(truth[: positions.stop])
    return [model.candidates(past, at, pool, layer) for at, pool in zip(positions, pools, strict=True)]


def collide(view: View, tried: list[Rows], positions: range, feature: str) -> Guess:
    """A6 by one invariant. tried: candidate_rows(); the answer's columns are their pools. Sealed rows are matched
    jointly: a candidate's distance is the sum over heads of its nearest row in the block of that position.

    Features are scaled by their spread over the candidates, those of one head and kind alike.
    """
    seen = FEATURES[feature](view.k, view.v)
    block_of = {at: (first, last) for first, last in view.blocks for at in range(first, last)}
    distance = []
    for at, rows in zip(positions, tried, strict=True):
        known = FEATURES[feature](rows.k, rows.v)  # (m, G, f)
        unit = known.std(0, keepdim=True).clamp_min(1e-6)
        first, last = block_of[at]
        part = view.part(first, last)
        distance.append(match(part, seen[first:last] / unit, known / unit).distance[0])
    return Guess(torch.stack(distance), torch.ones(len(distance), dtype=torch.int64))
