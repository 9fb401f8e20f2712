"""Schemes: which secret maps a session has, one set for each encoded layer and KV head.

A head is mapped after its rotary embedding. With M for queries and keys and N for values, k' = k M, q' = q M^-T,
v' = v N, so scores are the plain ones, and the attention output is out' N^-1. The query heads of a KV head share its
maps; M and N are independent. Rows are vectors on the left. It draws maps; engine/scx/secure.py applies them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from engine.core.registry import Registry
from engine.scx.keys import SHARED_HEAD, Label, SessionKeys
from engine.scx.matrices import draw_rotations, draw_scales, haar_rotations, invertible, rotations_of
from tessera_kernels import head_matrices


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
    maps of a head, 4, or 3 where queries and keys have the same one.

    What is secret is drawn on the host, into `drawn`; maps are made of it where they will lie.
    """

    matrices: bool
    shared: bool
    tables: int

    def drawn(self, layers: int, heads: int, dim: int) -> torch.Tensor:
        """Room in host memory for what is drawn for so many layers and KV heads."""

    def draw(self, keys: SessionKeys, layers: Sequence[int], segment: int, into: torch.Tensor) -> None:
        """Draw for a session (or one segment of it) into all of `drawn`."""

    def make(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        """The maps: into (tables, L, G, D[, D]) on the device of `drawn`."""


def map_shape(scheme: Scheme, layers: int, heads: int, dim: int) -> tuple[int, ...]:
    """The shape of one session's maps: (tables, L, G, D[, D])."""
    return (scheme.tables, layers, heads, dim, *((dim,) if scheme.matrices else ()))


def map_dtype(scheme: Scheme) -> torch.dtype:
    """float32 matrices or int16 orders."""
    return torch.float32 if scheme.matrices else torch.int16


def named(tables: Sequence[torch.Tensor]) -> Maps:
    """A scheme's tables under their names: queries have the keys' where there are three."""
    return Maps(tables[0], tables[-3], tables[-2], tables[-1])


def maps_of(
    scheme: Scheme, keys: SessionKeys, layers: Sequence[int], heads: int, dim: int, segment: int = 0
) -> Maps:
    """The maps of a session (or of one segment of it) for `heads` KV heads of `dim` entries, in host memory."""
    drawn = scheme.drawn(len(layers), heads, dim)
    tables = torch.empty(map_shape(scheme, len(layers), heads, dim), dtype=map_dtype(scheme))
    try:
        scheme.draw(keys, layers, segment, drawn)
        scheme.make(drawn, tables)
    finally:
        drawn.zero_()
    return named(tables.unbind(0))


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


def _labels(layers: Sequence[int], heads: int, segment: int) -> np.ndarray:
    """(L * G, 3) uint32: layer, head, segment."""
    grid = np.stack(np.meshgrid(layers, np.arange(heads), segment, indexing="ij"), axis=-1)
    return grid.reshape(-1, 3).astype(np.uint32)


def _flat(drawn: torch.Tensor) -> np.ndarray:
    """(K, L, G, D) in host memory as (K, L * G, D)."""
    return drawn.numpy().reshape(drawn.shape[0], -1, drawn.shape[-1])


@schemes.register("perm")
class Perm:
    """A permutation of the head's entries for each request, layer and KV head; another one for values. What is drawn
    is the maps."""

    matrices, shared, tables = False, False, 3

    def drawn(self, layers: int, heads: int, dim: int) -> torch.Tensor:
        """See Scheme."""
        return torch.zeros((3, layers, heads, dim), dtype=torch.int16)

    def draw(self, keys: SessionKeys, layers: Sequence[int], segment: int, into: torch.Tensor) -> None:
        """See Scheme."""
        labels, (qk, v, out) = _labels(layers, into.shape[2], segment), _flat(into)
        keys.shuffles("qk", labels, qk)
        keys.shuffles("v", labels, v, out)

    def make(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        """See Scheme."""
        into.copy_(drawn, non_blocking=True)


@schemes.register("perm-static")
class PermStatic(Perm):
    """SCX-vLLM's: one permutation a layer for queries, keys and values of all heads and requests. For comparison."""

    shared = True

    def draw(self, keys: SessionKeys, layers: Sequence[int], segment: int, into: torch.Tensor) -> None:
        """See Scheme. Segments share it, too."""
        dim = into.shape[3]
        order, inverse = (np.empty((len(layers), dim), dtype=np.int16) for _ in range(2))
        keys.shuffles("qk", [Label(layer, SHARED_HEAD) for layer in layers], order, inverse)
        for table, drawn in zip(into, (order, order, inverse), strict=True):
            table.copy_(torch.from_numpy(drawn)[:, None])


class _Matrices(ABC):
    """What rotate and mix have in common. Powers of two are drawn as `rows` rows of D int16 a head, and matrices are
    made of them on the device; other sizes are made on the host and are drawn whole."""

    matrices, shared = True, False
    rows: int
    tables: int

    @abstractmethod
    def _draw_rows(self, keys: SessionKeys, labels: np.ndarray, into: np.ndarray) -> None:
        """into: (rows, R, D) int16."""

    @abstractmethod
    def _draw_whole(self, keys: SessionKeys, labels: np.ndarray, into: torch.Tensor) -> None:
        """into: (tables, R, D, D) float32."""

    @abstractmethod
    def _make_rows(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        """(rows, R, D) to (tables, ..., D, D)."""

    def drawn(self, layers: int, heads: int, dim: int) -> torch.Tensor:
        """See Scheme."""
        if dim & (dim - 1):
            return torch.zeros((self.tables, layers, heads, dim, dim))
        return torch.zeros((self.rows, layers, heads, dim), dtype=torch.int16)

    def draw(self, keys: SessionKeys, layers: Sequence[int], segment: int, into: torch.Tensor) -> None:
        """See Scheme."""
        labels = _labels(layers, into.shape[2], segment)
        if into.dim() == 5:
            self._draw_whole(keys, labels, into.view(self.tables, -1, *into.shape[3:]))
        else:
            self._draw_rows(keys, labels, _flat(into))

    def make(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        """See Scheme. On a CPU in C++, or a layer at a time: what is made on the way is small."""
        if drawn.dim() == 5:
            into.copy_(drawn, non_blocking=True)
            return
        if head_matrices.fits(drawn, into):
            head_matrices.build(drawn, into)
            return
        count = drawn.shape[1] if drawn.device.type != "cpu" else 1
        for source, place in zip(drawn.split(count, 1), into.split(count, 1), strict=True):
            self._make_rows(source.flatten(1, 2), place)


@schemes.register("rotate")
class Rotate(_Matrices):
    """A rotation for each request, layer and KV head; another one for values."""

    rows, tables = 8, 3

    def _draw_rows(self, keys: SessionKeys, labels: np.ndarray, into: np.ndarray) -> None:
        draw_rotations(keys, "qk", labels, into[:4])
        draw_rotations(keys, "v", labels, into[4:])

    def _draw_whole(self, keys: SessionKeys, labels: np.ndarray, into: torch.Tensor) -> None:
        for table, purpose in zip(into, ("qk", "v"), strict=False):
            table.copy_(haar_rotations(keys, purpose, labels, into.shape[-1]))
        into[2] = into[1].mT

    def _make_rows(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        qk, v, out = into.flatten(1, 2)
        rotations_of(drawn[:4], qk)
        rotations_of(drawn[4:], v)
        out.copy_(v.mT)


@schemes.register("mix")
class Mix(_Matrices):
    """An invertible map of condition 4 at most for each request, layer and KV head; another one for values."""

    rows, tables = 20, 4  # for qk and v two rotations each, then the upper and lower halves of float32 scales

    def _draw_rows(self, keys: SessionKeys, labels: np.ndarray, into: np.ndarray) -> None:
        for purpose, rows in (("qk", into[:10]), ("v", into[10:])):
            draw_rotations(keys, f"{purpose}/left", labels, rows[:4])
            draw_rotations(keys, f"{purpose}/right", labels, rows[4:8])
            bits = draw_scales(keys, purpose, labels, into.shape[2]).float().numpy().view(np.uint32)
            rows[8], rows[9] = (half.astype(np.uint16).view(np.int16) for half in (bits >> 16, bits & 0xFFFF))
            bits.fill(0)

    def _draw_whole(self, keys: SessionKeys, labels: np.ndarray, into: torch.Tensor) -> None:
        dim = into.shape[-1]
        made = []
        for purpose in ("qk", "v"):
            left, right = (haar_rotations(keys, f"{purpose}/{side}", labels, dim) for side in ("left", "right"))
            made.append(invertible(left, draw_scales(keys, purpose, labels, dim), right))
        self._store(made[0], made[1], into)

    def _make_rows(self, drawn: torch.Tensor, into: torch.Tensor) -> None:
        made = []
        for rows in (drawn[:10], drawn[10:]):
            left, right = rotations_of(rows[:4]), rotations_of(rows[4:8])
            scales = ((rows[8].int() << 16) | (rows[9].int() & 0xFFFF)).view(torch.float32)
            made.append(invertible(left, scales, right))
            left.zero_(), right.zero_()
        self._store(made[0], made[1], into)

    def _store(self, qk: tuple[torch.Tensor, torch.Tensor], v: tuple[torch.Tensor, torch.Tensor],
               into: torch.Tensor) -> None:  # fmt: skip
        """Keys by M, queries by the transposed inverse, values by N, the output by its inverse."""
        for table, matrix in zip(into, (qk[1].mT, qk[0], *v), strict=True):
            table.view(matrix.shape).copy_(matrix)
        for matrix in (*qk, *v):
            matrix.zero_()
