"""A8 and A9: what rows tell about each other, without any vocabulary.

A8: which rows of a request hold equal tokens, and whether two requests were under one key (the alarm). A9: whether two
requests with the same prompt under different keys can be recognised as such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scripts.scx_attacks.rows import norms
from scripts.scx_attacks.view import View

EQUAL = 0.02  # relative distance below which two rows are taken for equal; bfloat16 rounds to 0.004
ALARM_SHARE = 0.05


def _near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, m) whether rows a (n, D) and b (m, D) are equal within rounding."""
    size = (a.norm(dim=-1)[:, None] + b.norm(dim=-1)[None]) / 2
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") <= EQUAL * size


def equal_rows(view: View) -> torch.Tensor:
    """A8: (G, n, n) whether two rows' values are equal, per head, own row included."""
    return torch.stack([_near(view.v[:, g], view.v[:, g]) for g in range(view.v.shape[1])])


def equal_pairs(view: View, tokens: torch.Tensor) -> tuple[float, float]:
    """Precision and recall of equal_rows as a test for equal tokens (n,), over pairs i < j.

    Sealed rows have lost their index, so there the numbers of pairs are compared, per head. No pair flagged:
    precision 1.
    """
    flagged = equal_rows(view).triu(1)  # (G, n, n)
    true = (tokens[:, None] == tokens[None]).triu(1)
    if not view.rules.seal_tokens:
        together = flagged.all(0)
        hits, said = int((together & true).sum()), int(together.sum())
        return (hits / said if said else 1.0), hits / max(1, int(true.sum()))
    counts, wanted = flagged.sum((1, 2)).double(), float(true.sum())
    hit = counts.clamp_max(wanted)
    precision = float((hit / counts.clamp_min(1)).mean()) if counts.any() else 1.0
    return precision, float(hit.mean()) / max(1.0, wanted)


def reuse_share(one: View, other: View) -> float:
    """A8 across requests: the share of rows of `one` that `other` holds as well, per head. Under fresh keys none."""
    heads = [_near(one.v[:, g], other.v[:, g]).any(1).double().mean() for g in range(one.v.shape[1])]
    return float(torch.stack(heads).mean())


def reuse_alarm(one: View, other: View) -> bool:
    """Whether two requests look as if they were under one key."""
    return reuse_share(one, other) > ALARM_SHARE


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x: (n, G, D) -> (n, G, n): each row's products with all rows, in order of size; rotations keep them."""
    return torch.einsum("igd,jgd->igj", x, x).sort(-1).values


def _projection(x: torch.Tensor) -> torch.Tensor:
    """x: (n, G, D) -> (n, G, n): rows of X (X^T X)^-1 X^T in order of size; every invertible map keeps them. They say
    something only while n is larger than D."""
    basis = torch.linalg.qr(x.transpose(0, 1).double()).Q  # (G, n, D)
    return (basis @ basis.transpose(1, 2)).permute(1, 0, 2).float().sort(-1).values


LINKS: dict[str, Callable[[View], torch.Tensor]] = {
    "raw": lambda view: torch.cat([view.k, view.v], -1),
    "sorted": lambda view: torch.cat([view.k.sort(-1).values, view.v.sort(-1).values], -1),
    "norms": lambda view: norms(view.k, view.v),
    "gram": lambda view: torch.cat([_gram(view.k), _gram(view.v)], -1),
    "projection": lambda view: torch.cat([_projection(view.k), _projection(view.v)], -1),
}


def linked(one: View, other: View, by: str) -> torch.Tensor:
    """A9: for each row of `one`, the row of `other` with the nearest feature. Features are put to spread 1 in each
    request. Returns (G, n) indices; heads apart where rows are sealed (shuffled per head), else G = 1."""
    a, b = ((x - x.mean(0)) / (x.std(0) + 1e-6) if by == "norms" else x / x.std() for x in map(LINKS[by], (one, other)))
    if not one.rules.seal_tokens:
        a, b = a.flatten(1)[:, None], b.flatten(1)[:, None]
    return torch.stack([torch.cdist(a[:, g], b[:, g]).argmin(1) for g in range(a.shape[1])])


def link_rate(one: View, other: View, by: str) -> float:
    """The share of rows linked to the row of the same place, or where rows are sealed to the same block."""
    where = torch.empty(one.tokens, dtype=torch.int64)
    for number, (first, last) in enumerate(one.blocks):
        where[first:last] = number
    return float((where[linked(one, other, by)] == where).double().mean())


def link_chance(view: View) -> float:
    """link_rate by guessing."""
    return sum((last - first) ** 2 for first, last in view.blocks) / view.tokens**2
