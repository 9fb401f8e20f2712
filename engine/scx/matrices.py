"""Secret matrices from key streams: rotations and well-conditioned invertible maps, many labels at once.

A rotation of a power of two is two rounds of (permute, change signs, Hadamard): its entries are multiples of 1/D, so it
is exact in float32 and its inverse is its transpose to the last bit. Other sizes take the orthogonal factor of a
Gaussian matrix. It knows no layers, heads or devices.
Sources: Ailon and Chazelle 2009 (randomised Hadamard transforms), Stewart 1980 and Mezzadri 2007 (orthogonal matrices
distributed by Haar's measure), Golub and Van Loan 5.2 (Householder's factorisation).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from engine.scx.keys import Labels, SessionKeys, uniforms

CONDITION = 4.0  # of an invertible map; more would cost accuracy in 16 bits


def draw_rotations(keys: SessionKeys, purpose: str, labels: Labels, into: np.ndarray) -> None:
    """What rotations of a power of two are made of, into (4, R, D) int16: two orders, then two rows of signs."""
    for i in (1, 2):
        keys.shuffles(f"{purpose}/order{i}", labels, into[i - 1])
    keys.signs(f"{purpose}/signs", labels, into[2:])


def rotations_of(drawn: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The orthogonal matrices of (4, R, D) int16, on its device: (R, D, D) float32, in `out` where given (contiguous);
    rows are mapped as x @ matrix. x is permuted, gets signs, is multiplied by H, and all that once more, over D."""
    dim = drawn.shape[2]
    plain = hadamard(dim, drawn.device)
    first, second = drawn[0].long(), drawn[1].long()
    signs = drawn[2:].float()
    # x -> x[order] * signs -> H needs no product the first time: rows of H, each with a sign, in another order
    made = torch.empty((drawn.shape[1], dim, dim), device=drawn.device)
    made.scatter_(1, first[:, :, None].expand_as(made), signs[0, :, :, None] * plain)
    turned = made.gather(2, second[:, None].expand_as(made)).mul_(signs[1, :, None])
    done = torch.matmul(turned, plain, out=out).div_(dim)  # sums of at most dim signs: exact in float32
    made.zero_(), turned.zero_()
    return done


def haar_rotations(keys: SessionKeys, purpose: str, labels: Labels, dim: int) -> torch.Tensor:
    """A secret orthogonal matrix of any size for each label: (R, D, D) float64."""
    return torch.from_numpy(_haar(keys, purpose, labels, dim))


def draw_scales(keys: SessionKeys, purpose: str, labels: Labels, dim: int) -> torch.Tensor:
    """(R, D) float64, log-uniform around 1 with CONDITION between the largest and the smallest that can be: so a map
    and its inverse treat sizes alike."""
    return torch.from_numpy(CONDITION ** (uniforms(keys.words(f"{purpose}/scales", labels, 2 * dim)) - 0.5))


def invertible(first: torch.Tensor, scales: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, inverse of M), each (R, D, D), of condition CONDITION at most: rotation, scales (R, D), rotation. On a GPU
    the products are in float64, whatever the setting of float32 ones."""
    if first.device.type != "cpu":
        first, scales, second = first.double(), scales.double(), second.double()
    return (first * scales[:, None]) @ second, (second.mT / scales[:, None]) @ first.mT


@lru_cache(maxsize=16)
def hadamard(dim: int, device: torch.device = torch.device("cpu")) -> torch.Tensor:  # noqa: B008  a constant
    """Sylvester's (dim, dim) float32 matrix of 1 and -1; dim is a power of two. Shared: not to be changed."""
    made = torch.ones((1, 1))
    while made.shape[0] < dim:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made.to(device)


def _haar(keys: SessionKeys, purpose: str, labels: Labels, dim: int) -> np.ndarray:
    """Orthogonal factors of Gaussian matrices, by Householder's reflections in a fixed order; R's diagonal is made
    positive, which is what makes the factor Haar's."""
    points = uniforms(keys.words(f"{purpose}/normal", labels, 4 * dim * dim)).reshape(len(labels), 2, dim, dim)
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
