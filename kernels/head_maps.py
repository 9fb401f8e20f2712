"""Linear maps of heads around attention: rotary embedding, then a map of q, k and v; and the way back for its output.

A map belongs to a table row and a KV head: an order of the head's entries, int16 (T, G, D), where entry j of the result
is entry map[j] of the head; or a matrix, float32 (T, G, D, D), applied as head @ map. The query heads of a KV head
share it. It knows neither where maps come from nor that they are secret.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tessera_kernels.checks import require
from tessera_kernels.rope_store import rotate_reference


class Rows(NamedTuple):
    """Where N tokens belong: positions, slots and table rows, (N,) int32 each."""

    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor


def encode_reference(
    qkv: torch.Tensor, cos_sin: torch.Tensor, rows: Rows, q_map: torch.Tensor, k_map: torch.Tensor,
    v_map: torch.Tensor, heads: int, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotate q and k of qkv (N, (H + 2G) * D) by cos_sin (P, 2, D/2), map q, k, v, round once: (N, H + 2G, D)."""
    groups, dim = k_map.shape[1:3]
    split = qkv.view(-1, heads + 2 * groups, dim)
    wide = split if qkv.dtype is torch.float64 else split.float()
    angles = cos_sin[rows.positions.long()].to(wide.dtype)
    rotated = rotate_reference(wide[:, : heads + groups], angles[:, None, 0], angles[:, None, 1], interleaved)
    parts = (rotated[:, :heads], rotated[:, heads:], wide[:, heads + groups :])
    mapped = [map_heads(x, table, rows.tables) for x, table in zip(parts, (q_map, k_map, v_map), strict=True)]
    return torch.cat(mapped, dim=1).to(qkv.dtype)


def decode_reference(
    attended: torch.Tensor, tables: torch.Tensor, out_map: torch.Tensor, heads: int
) -> torch.Tensor:
    """attended (N, H * D) mapped by row tables[n] of out_map and rounded once: (N, H * D)."""
    dim = out_map.shape[2]
    require(attended.shape[1] == heads * dim, "attended has %d columns; want %d", attended.shape[1], heads * dim)
    wide = attended if attended.dtype is torch.float64 else attended.float()
    return map_heads(wide.view(-1, heads, dim), out_map, tables).to(attended.dtype).flatten(1)


def map_heads(x: torch.Tensor, maps: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """x (N, H, D) in a wide type, each head by the map of its table row and KV head. Same shape."""
    count, heads, dim = x.shape
    groups = maps.shape[1]
    grouped = x.reshape(count, groups, heads // groups, dim)
    if maps.dim() == 3:
        order = maps[tables.long()].long()[:, :, None].expand_as(grouped)  # (N, G, H / G, D)
        return grouped.gather(3, order).view(x.shape)
    runs, lengths = torch.unique_consecutive(tables, return_counts=True)
    if runs.shape[0] == count:  # one row each: a batch of decodes
        return (grouped @ maps[tables.long()].to(x.dtype)).view(x.shape)
    done = []
    for table, run in zip(runs.tolist(), grouped.split(lengths.tolist()), strict=True):
        done.append(torch.einsum("ngrd,gde->ngre", run, maps[table].to(x.dtype)))
    return torch.cat(done).view(x.shape)
