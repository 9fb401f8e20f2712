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


def _directions(x: torch.Tensor) -> torch.Tensor:
    """Rows at length 1: what is left when their lengths, which A4 takes, are out of account."""
    return x / x.norm(dim=-1, keepdim=True)


def sorted_values(model: PublicModel, view: View, *, shape_only: bool = False) -> Guess:
    """A2: coordinates in order of size, per head, by L1: the same for every permutation of channels.

    shape_only: of rows at length 1, so that the answer tells what the order of coordinates gives by itself.
    """
    seen, known = view.v, model.first_rows().v
    if shape_only:
        seen, known = _directions(seen), _directions(known)
    return match(view, seen.sort(-1).values, known.sort(-1).values, norm=1)


def hadamard(size: int) -> torch.Tensor:
    """The Sylvester-Hadamard matrix, orthonormal and symmetric. size: a power of two. Returns (size, size)."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / size**0.5


def sorted_magnitudes(model: PublicModel, view: View, *, shape_only: bool = False) -> Guess:
    """A3: magnitudes in order, of the rows as they are and of the rows behind H^-1: one round of signs, permutation
    and a public Hadamard H falls to the second. The nearer of the two counts. shape_only: as in A2."""
    rows, table = view.v, model.first_rows().v
    if shape_only:
        rows, table = _directions(rows), _directions(table)
    known, tries = table.abs().sort(-1).values, [rows]
    if view.v.shape[-1] & (view.v.shape[-1] - 1) == 0:
        tries.append(rows @ hadamard(view.v.shape[-1]))
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
