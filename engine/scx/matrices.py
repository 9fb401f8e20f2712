"""Secret matrices from key streams: rotations and well-conditioned invertible maps, many labels at once.

A rotation of a power of two is two rounds of (permute, change signs, Hadamard): its entries are multiples of 1/D, so it
is exact in float32 and its inverse is its transpose to the last bit. Other sizes take the orthogonal factor of a
Gaussian matrix. It knows no layers, heads or devices.
Sources: Ailon and Chazelle 2009 (randomised Hadamard transforms), Stewart 1980 and Mezzadri 2007 (orthogonal matrices
distributed by Haar's measure), Golub and Van Loan 5.2 (Householder's factorisation).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.scx.keys import Label, SessionKeys, permutations, uniforms

CONDITION = 4.0  # of an invertible map; more would cost accuracy in 16 bits


def rotations(keys: SessionKeys, purpose: str, labels: Sequence[Label], dim: int) -> torch.Tensor:
    """A secret orthogonal matrix for each label: (R, D, D) float64, or float32 where that is exact (D a power of two);
    rows are mapped as x @ matrix."""
    if dim & (dim - 1):
        return torch.from_numpy(_haar(keys, purpose, labels, dim))
    plain = hadamard(dim).float()
    orders = (permutations(keys, f"{purpose}/order{i}", labels, dim) for i in (1, 2))
    first, second = (torch.from_numpy(order).long() for order in orders)
    signs = np.stack([keys.stream(f"{purpose}/signs", label).words(2 * dim) >> np.uint32(31) for label in labels])
    flips = torch.from_numpy(1.0 - 2.0 * signs).float().view(len(labels), 2, dim)
    # x -> x[order] * signs -> H needs no product the first time: rows of H, each with a sign, in another order
    made = torch.empty((len(labels), dim, dim))
    made.scatter_(1, first[:, :, None].expand_as(made), flips[:, 0, :, None] * plain)
    made = made.gather(2, second[:, None].expand_as(made)).mul_(flips[:, 1, None])
    return (made @ plain).div_(dim)  # sums of at most dim signs: exact in float32


def invertible(
    keys: SessionKeys, purpose: str, labels: Sequence[Label], dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, inverse of M), each (R, D, D), of condition CONDITION at most: rotation, scales, rotation.

    Scales are log-uniform around 1, so that a map and its inverse treat sizes alike.
    """
    first, second = (rotations(keys, f"{purpose}/{side}", labels, dim) for side in ("left", "right"))
    points = np.stack([uniforms(keys.stream(f"{purpose}/scales", label), dim) for label in labels])
    scales = (CONDITION ** (torch.from_numpy(points) - 0.5)[:, None]).to(first.dtype)  # (R, 1, D)
    return (first * scales) @ second, (second.mT / scales) @ first.mT


def hadamard(dim: int) -> torch.Tensor:
    """Sylvester's (dim, dim) float64 matrix of 1 and -1; dim is a power of two."""
    made = torch.ones((1, 1), dtype=torch.float64)
    while made.shape[0] < dim:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _haar(keys: SessionKeys, purpose: str, labels: Sequence[Label], dim: int) -> np.ndarray:
    """Orthogonal factors of Gaussian matrices, by Householder's reflections in a fixed order; R's diagonal is made
    positive, which is what makes the factor Haar's."""
    points = np.stack([uniforms(keys.stream(f"{purpose}/normal", label), 2 * dim * dim) for label in labels])
    points = points.reshape(len(labels), 2, dim, dim)
    rest = np.sqrt(-2.0 * np.log(points[:, 0])) * np.cos(2.0 * np.pi * points[:, 1])
    made = np.tile(np.eye(dim), (len(labels), 1, 1))
    signs = np.ones((len(labels), 1, dim))
    for k in range(dim):
        direction = rest[:, k:, k].copy()  # (R, dim - k)
        ahead = np.where(direction[:, 0] >= 0, 1.0, -1.0)
        direction[:, 0] += ahead * np.sqrt(np.sum(direction * direction, axis=1))
        signs[:, 0, k] = -ahead
        direction /= np.sqrt(np.sum(direction * direction, axis=1))[:, None]
        rest[:, k:] -= 2.0 * direction[:, :, None] * np.einsum("rn,rnd->rd", direction, rest[:, k:])[:, None]
        made[:, :, k:] -= 2.0 * np.einsum("rdn,rn->rd", made[:, :, k:], direction)[:, :, None] * direction[:, None]
    return made * signs
