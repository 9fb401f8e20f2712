"""A1-A4: one row at a time against the rows that every vocabulary token would write at layer 0.

A1 nearest neighbour on values (and on keys, rotated back); A2 sorted coordinates; A3 sorted magnitudes, also behind
the inverse of a public Hadamard matrix; A4 norms. None uses more than public weights and one snapshot (V1).
"""

from __future__ import annotations

import torch

from scripts.scx_attacks.public import PublicModel, rotate
from scripts.scx_attacks.view import Guess, View, match


def nearest_value(model: PublicModel, view: View) -> Guess:
    """A1 on V: the values as they are."""
    return match(view, view.v, model.first_rows().v)


def nearest_key(model: PublicModel, view: View) -> Guess:
    """A1 on K: keys rotated back to position 0. Where rows are sealed a row's position is not known: not for those."""
    return match(view, rotate(view.k, model.rope[: view.tokens], back=True), model.first_rows().k)


def sorted_values(model: PublicModel, view: View) -> Guess:
    """A2: coordinates in order of size, per head, by L1: the same for every permutation of channels."""
    return match(view, view.v.sort(-1).values, model.first_rows().v.sort(-1).values, norm=1)


def hadamard(size: int) -> torch.Tensor:
    """The Sylvester-Hadamard matrix, orthonormal and symmetric. size: a power of two. Returns (size, size)."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / size**0.5


def sorted_magnitudes(model: PublicModel, view: View) -> Guess:
    """A3: magnitudes in order, of the rows as they are and of the rows behind H^-1: one round of signs, permutation
    and a public Hadamard H falls to the second. The nearer of the two counts."""
    known = model.first_rows().v.abs().sort(-1).values
    tries = [view.v]
    if view.v.shape[-1] & (view.v.shape[-1] - 1) == 0:
        tries.append(view.v @ hadamard(view.v.shape[-1]))
    guesses = [match(view, seen.abs().sort(-1).values, known, norm=1) for seen in tries]
    return Guess(torch.stack([guess.distance for guess in guesses]).amin(0), guesses[0].bag)


def norms(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(n, G, 2): lengths of a row's key and value per head. Rotations, rotary positions included, keep them."""
    return torch.stack([k.norm(dim=-1), v.norm(dim=-1)], dim=-1)


def norm_fingerprint(model: PublicModel, view: View) -> Guess:
    """A4: the 2 G lengths of a token, in units of their spread over the vocabulary."""
    rows = model.first_rows()
    known = norms(rows.k, rows.v)
    unit = known.std(0, keepdim=True)
    return match(view, norms(view.k, view.v) / unit, known / unit)


def scaled_norms(model: PublicModel, view: View) -> Guess:
    """A4 for maps that stretch: logarithms of the lengths, mean and spread over the request set to the vocabulary's."""
    rows = model.first_rows()
    known, seen = norms(rows.k, rows.v).log(), norms(view.k, view.v).log()
    whiten = lambda x: (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True)  # noqa: E731
    return match(view, whiten(seen), whiten(known))
