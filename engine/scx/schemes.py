"""Schemes: which secret maps a session has, one set for each encoded layer and KV head.

A head is mapped after its rotary embedding. With M for queries and keys and N for values, k' = k M, q' = q M^-T,
v' = v N, so scores are the plain ones, and the attention output is out' N^-1. The query heads of a KV head share its
maps; M and N are independent. Rows are vectors on the left. It draws maps; engine/scx/secure.py applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from engine.core.registry import Registry
from engine.scx.keys import SHARED_HEAD, Label, SessionKeys, permutations
from engine.scx.matrices import invertible, rotations


class Maps(NamedTuple):
    """The maps of L layers and G KV heads for queries, keys, values and the output: int16 (L, G, D), where position j
    of the result is entry map[j] of the head, or float32 (L, G, D, D), applied as head @ map."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor

    def __repr__(self) -> str:
        return "<Maps>"


class Scheme(Protocol):
    """One way to make maps. matrices: whether maps are matrices. shared: one key for all requests. tables: different
    maps of a head, 4, or 3 where queries and keys have the same one."""

    matrices: bool
    shared: bool
    tables: int

    def maps(self, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0) -> Maps:
        """The maps of a session (or of one segment of it) for `heads` KV heads of `dim` entries."""


schemes: Registry[type[Scheme]] = Registry("SCX scheme", "engine.scx")


def map_bytes(scheme: str, layers: int, heads: int, dim: int) -> int:
    """What the maps of one session (or of one segment) of `layers` layers and `heads` KV heads take [bytes]."""
    kind = schemes[scheme]
    return kind.tables * layers * heads * dim * (4 * dim if kind.matrices else 2)


def row_bytes(scheme: str, heads: int, kv_heads: int, dim: int, item_bytes: int) -> tuple[int, int]:
    """What one token of one encoded layer moves to the secure side and from it [bytes]: projections in float32 for
    matrices, q, k and v back, the attention output both ways."""
    projections = (heads + 2 * kv_heads) * dim
    wide_bytes = 4 if schemes[scheme].matrices else item_bytes
    return projections * wide_bytes + heads * dim * item_bytes, (projections + heads * dim) * item_bytes


def _labels(layers: Sequence[int], heads: int, segment: int) -> list[Label]:
    return [Label(layer, head, segment) for layer in layers for head in range(heads)]


def _inverse(orders: torch.Tensor) -> torch.Tensor:
    """The inverse permutations, along the last axis."""
    return orders.argsort(dim=-1).to(torch.int16)


@schemes.register("perm")
class Perm:
    """A permutation of the head's entries for each request, layer and KV head; another one for values."""

    matrices, shared, tables = False, False, 3

    def maps(self, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0) -> Maps:
        """See Scheme."""
        labels = _labels(layers, heads, segment)
        drawn = (torch.from_numpy(permutations(keys, purpose, labels, dim)) for purpose in ("qk", "v"))
        qk, v = (orders.view(len(layers), heads, dim) for orders in drawn)
        return Maps(qk, qk, v, _inverse(v))


@schemes.register("perm-static")
class PermStatic:
    """SCX-vLLM's: one permutation a layer for queries, keys and values of all heads and requests. For comparison."""

    matrices, shared, tables = False, True, 3

    def maps(self, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0) -> Maps:
        """See Scheme."""
        drawn = permutations(keys, "qk", [Label(layer, SHARED_HEAD) for layer in layers], dim)
        order = torch.from_numpy(drawn)[:, None].repeat(1, heads, 1)
        return Maps(order, order, order, _inverse(order))


@schemes.register("rotate")
class Rotate:
    """A rotation for each request, layer and KV head; another one for values."""

    matrices, shared, tables = True, False, 3

    def maps(self, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0) -> Maps:
        """See Scheme."""
        labels, shape = _labels(layers, heads, segment), (len(layers), heads, dim, dim)
        qk, v = (rotations(keys, purpose, labels, dim).float().view(shape) for purpose in ("qk", "v"))
        return Maps(qk, qk, v, v.mT.contiguous())


@schemes.register("mix")
class Mix:
    """An invertible map of condition 4 at most for each request, layer and KV head; another one for values."""

    matrices, shared, tables = True, False, 4

    def maps(self, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0) -> Maps:
        """See Scheme."""
        labels, shape = _labels(layers, heads, segment), (len(layers), heads, dim, dim)
        (k, back), (v, out) = (invertible(keys, purpose, labels, dim) for purpose in ("qk", "v"))
        q = back.mT
        return Maps(*(made.float().contiguous().view(shape) for made in (q, k, v, out)))
