"""Linear maps of heads around attention: rotary embedding, then a map of q, k and v; and the way back for its output.

A map belongs to a table row and a KV head: an order of the head's entries, int16 (T, G, D), where entry j of the result
is entry map[j] of the head; or a matrix, float32 (T, G, D, D), applied as head @ map. The query heads of a KV head
share it. It knows neither where maps come from nor that they are secret.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tessera_kernels.checks import kv_view, require, require_ints, require_rows
from tessera_kernels.native import OPS
from tessera_kernels.rope_store import rotate_reference


class Rows(NamedTuple):
    """Where N tokens belong: positions, slots and table rows, (N,) int32 each."""

    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor


def encode_store(
    qkv: torch.Tensor, cos_sin: torch.Tensor, rows: Rows, maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k_view: torch.Tensor, v_view: torch.Tensor, heads: int, interleaved: bool = False, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotates q and k, maps q, k and v by maps = (q's, k's, v's), stores k and v at [slot, position], returns q
    (N, H, D), which is `out` where that is given.

    qkv (N, (H + 2G) * D), of the views' dtype or fp32; cos_sin (P, 2, D/2) fp32; k_view, v_view (S, C, G, D). q comes
    in the views' dtype. Everything between qkv and the one rounding is fp32; a row's bits depend on that row and its
    maps alone. An order's entries must lie in 0..D-1; they are not checked. Raises ValueError for a wrong shape, dtype
    or stride, IndexError for a place or table outside.
    """
    groups, dim = k_view.shape[2:]
    ops = OPS.get(k_view.dtype)
    wide = qkv.dtype is torch.float32 is not k_view.dtype
    if ops is None or qkv.device.type != "cpu":
        done = encode_reference(qkv, cos_sin, rows, *maps, heads, interleaved, dtype=k_view.dtype)
        where = (rows.slots.long(), rows.positions.long())
        k_view[where], v_view[where] = done[:, heads : heads + groups], done[:, heads + groups :]
        return done[:, :heads].contiguous() if out is None else out.copy_(done[:, :heads])
    tokens = rows.positions.shape[0]
    require_rows("qkv", qkv, (heads + 2 * groups) * dim, torch.float32 if wide else k_view.dtype)
    require(qkv.shape[0] == tokens, "qkv has %d rows for %d positions; want as many", qkv.shape[0], tokens)
    for name, column in zip(Rows._fields, rows, strict=True):
        require_ints(name, column, tokens)
    require(cos_sin.shape[1:] == (2, dim // 2) and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous(),
            "cos_sin is %s %s; want (P, 2, %d) torch.float32 contiguous", tuple(cos_sin.shape), cos_sin.dtype,
            dim // 2)  # fmt: skip
    for one in maps:
        _require_map(one, maps[0], heads, groups, dim)
    q = torch.empty((tokens, heads, dim), dtype=k_view.dtype) if out is None else out
    require(tuple(q.shape) == (tokens, heads, dim) and q.dtype is k_view.dtype and q.is_contiguous(),
            "out is %s %s; want (%d, %d, %d) contiguous", tuple(q.shape), q.dtype, tokens, heads, dim)  # fmt: skip
    ops.encode_store(qkv.data_ptr(), cos_sin.data_ptr(), *(column.data_ptr() for column in rows), q.data_ptr(),
                     kv_view(k_view, v_view, k_view.dtype), *(one.data_ptr() for one in maps), maps[0].dim() == 4,
                     maps[0].shape[0], maps[0].stride(0), tokens, heads, groups, dim, interleaved, cos_sin.shape[0],
                     wide)  # fmt: skip
    return q


def encode(
    qkv: torch.Tensor, cos_sin: torch.Tensor, rows: Rows, maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int, out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """encode_store without slabs: q (N, H, D), k and v (N, G, D), one behind the other in out (N * (H + 2G) * D,),
    whose dtype they get; qkv is of that or fp32."""
    count, (groups, dim) = qkv.shape[0], maps[1].shape[1:3]
    parts = out.split([count * heads * dim, count * groups * dim, count * groups * dim])
    q, k, v = (part.view(count, -1, dim) for part in parts)
    if out.dtype not in OPS or qkv.device.type != "cpu":
        done = encode_reference(qkv, cos_sin, rows, *maps, heads, dtype=out.dtype).split([heads, groups, groups], dim=1)
        for into, rows_of in zip((q, k, v), done, strict=True):
            into.copy_(rows_of)
        return q, k, v
    # every token is a slot of its own, in which all positions are the same place
    own = rows._replace(slots=torch.arange(count, dtype=torch.int32))
    places = [x.as_strided((count, cos_sin.shape[0], groups, dim), (groups * dim, 0, dim, 1)) for x in (k, v)]
    encode_store(qkv, cos_sin, own, maps, places[0], places[1], heads, out=q)
    return q, k, v


def decode(attended: torch.Tensor, tables: torch.Tensor, out_map: torch.Tensor, heads: int) -> torch.Tensor:
    """attended (N, H * D), each head mapped by row tables[n] of out_map in fp32 and rounded once: (N, H * D).

    Bits and errors as encode_store's.
    """
    groups, dim = out_map.shape[1:3]
    ops = OPS.get(attended.dtype)
    if ops is None or attended.device.type != "cpu":
        return decode_reference(attended, tables, out_map, heads)
    tokens = attended.shape[0]
    require_rows("attended", attended, heads * dim, attended.dtype)
    require_ints("tables", tables, tokens)
    _require_map(out_map, out_map, heads, groups, dim)
    out = torch.empty_like(attended)
    ops.decode_heads(attended.data_ptr(), out.data_ptr(), tables.data_ptr(), out_map.data_ptr(), out_map.dim() == 4,
                     out_map.shape[0], out_map.stride(0), tokens, heads, groups, dim)  # fmt: skip
    return out


def _require_map(one: torch.Tensor, like: torch.Tensor, heads: int, groups: int, dim: int) -> None:
    """`one` is (T, G, D) int16 or (T, G, D, D) float32, contiguous behind T, of the shape and strides of `like`."""
    wanted = torch.int16 if one.dim() == 3 else torch.float32
    fits = one.shape == like.shape and tuple(one.shape[1:]) in ((groups, dim), (groups, dim, dim))
    strides = (dim, 1) if one.dim() == 3 else (dim * dim, dim, 1)
    fits = fits and one.stride()[1:] == strides and one.stride() == like.stride()
    require(fits and one.dtype is wanted and heads % groups == 0,
            "a map is %s %s with strides %s for %d heads; want (T, %d, %d) torch.int16 or (T, %d, %d, %d) "
            "torch.float32, contiguous behind T",
            tuple(one.shape), one.dtype, one.stride(), heads, groups, dim, groups, dim, dim)  # fmt: skip


def encode_reference(
    qkv: torch.Tensor, cos_sin: torch.Tensor, rows: Rows, q_map: torch.Tensor, k_map: torch.Tensor,
    v_map: torch.Tensor, heads: int, interleaved: bool = False, *, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotate q and k of qkv (N, (H + 2G) * D) by cos_sin (P, 2, D/2), map q, k, v, round once, to dtype (without one,
    qkv's): (N, H + 2G, D)."""
    groups, dim = k_map.shape[1:3]
    split = qkv.view(-1, heads + 2 * groups, dim)
    wide = split if qkv.dtype is torch.float64 else split.float()
    angles = cos_sin[rows.positions.long()].to(wide.dtype)
    rotated = rotate_reference(wide[:, : heads + groups], angles[:, None, 0], angles[:, None, 1], interleaved)
    parts = (rotated[:, :heads], rotated[:, heads:], wide[:, heads + groups :])
    mapped = [map_heads(x, table, rows.tables) for x, table in zip(parts, (q_map, k_map, v_map), strict=True)]
    return torch.cat(mapped, dim=1).to(dtype or qkv.dtype)


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
