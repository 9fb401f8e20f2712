"""Maps of heads: the C++ kernels against their reference, each row's bits its own, nothing outside its place."""

from __future__ import annotations

import pytest
import torch

from tessera_kernels import native
from tessera_kernels.head_maps import Rows, decode, decode_reference, encode, encode_reference, encode_store
from tessera_kernels.native import OPS
from tests.kernels.cases import DTYPES, Chunk, angles, ragged, rand, same_bits, slab

HEADS, GROUPS, SLOTS, TOKENS = 6, 2, 4, 40
CHUNKS = [Chunk(0, 2, 5, 9), Chunk(1, 0, 0, 23), *(Chunk(2 + i, slot, 7, 1) for i, slot in enumerate((3, 1)))]
KINDS = ("order", "matrix")
DIMS = (16, 64, 128, 24)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Each test starts from two threads, whatever the one before set."""
    native.set_threads(2)


def rows_of(chunks: list[Chunk]) -> Rows:
    """Where the chunks' tokens belong; tables are slots."""
    made = ragged(chunks)
    return Rows(made["positions"], made["token_slots"], made["token_slots"])


def maps_of(kind: str, dim: int, count: int) -> list[torch.Tensor]:
    """Random orders or matrices for every slot and KV head."""
    if kind == "matrix":
        return [rand(SLOTS, GROUPS, dim, dim, dtype=torch.float32, seed=7 + i, scale=dim**-0.5) for i in range(count)]
    return [rand(SLOTS, GROUPS, dim, dtype=torch.float32, seed=7 + i).argsort(-1).short() for i in range(count)]


def projections(dtype: torch.dtype, dim: int, count: int) -> torch.Tensor:
    """qkv (count, (H + 2G) * D)."""
    return rand(count, (HEADS + 2 * GROUPS) * dim, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("layers", [0, 3])
def test_encode_store(dtype: torch.dtype, kind: str, dim: int, layers: int) -> None:
    """Equal to float64 within rounding (an order: to the reference, bit for bit in what it only moves); rows of other
    tokens stay as they were; both head counts of a group, both strides of a slab."""
    rows, maps = rows_of(CHUNKS), maps_of(kind, dim, 3)
    qkv, cos_sin = projections(dtype, dim, rows.positions.shape[0]), angles(TOKENS, dim)
    k, v = slab(SLOTS, TOKENS, GROUPS, dim, dtype, layers=layers)
    q = encode_store(qkv, cos_sin, rows, (maps[0], maps[1], maps[2]), k, v, HEADS)
    wide = [one.double() if kind == "matrix" else one for one in maps]
    want = encode_reference(qkv.double(), cos_sin, rows, wide[0], wide[1], wide[2], HEADS)
    where = (rows.slots.long(), rows.positions.long())
    got = torch.cat([q, k[where], v[where]], dim=1).double()
    bound = (8e-3 if dtype is torch.bfloat16 else 4e-6) * (want.abs() + want.pow(2).mean().sqrt())
    assert bool(((got - want).abs() <= bound).all())
    flat = torch.empty_like(qkv).flatten()
    for part, stored in zip(encode(qkv, cos_sin, rows, tuple(maps), HEADS, flat), (q, k[where], v[where])):
        assert same_bits(part, stored), "without slabs: the same bits"
    assert same_bits(flat[: q.numel()].view(q.shape), q)
    if kind == "order":
        assert same_bits(v[where], encode_reference(qkv, cos_sin, rows, *maps, HEADS)[:, HEADS + GROUPS :])
    k[where], v[where] = 0, 0
    assert not k.any() and not v.any(), "rows of no token were written"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_wide_projections_are_rounded_once(kind: str, dim: int) -> None:
    """float32 in, bfloat16 out: within half a unit of float64's, where rounding projections first is not; encode
    writes the same bits."""
    rows, maps = rows_of(CHUNKS), maps_of(kind, dim, 3)
    qkv, cos_sin = projections(torch.float32, dim, rows.positions.shape[0]), angles(TOKENS, dim)
    k, v = slab(SLOTS, TOKENS, GROUPS, dim, torch.bfloat16, layers=3)
    where, all_maps = (rows.slots.long(), rows.positions.long()), (maps[0], maps[1], maps[2])

    def stored(rows_in: torch.Tensor) -> torch.Tensor:
        q = encode_store(rows_in, cos_sin, rows, all_maps, k, v, HEADS)
        return torch.cat([q, k[where], v[where]], dim=1)

    once, twice = stored(qkv), stored(qkv.bfloat16())
    wide = [one.double() if kind == "matrix" else one for one in maps]
    want = encode_reference(qkv.double(), cos_sin, rows, wide[0], wide[1], wide[2], HEADS)
    assert once.dtype is torch.bfloat16
    errors = [float((got.double() - want).norm()) for got in (want.bfloat16(), once, twice)]
    assert errors[1] < 1.001 * errors[0] and errors[2] > 1.2 * errors[0]
    flat = torch.empty(qkv.numel(), dtype=torch.bfloat16)
    parts = torch.cat(encode(qkv, cos_sin, rows, all_maps, HEADS, flat), dim=1)
    assert same_bits(parts, once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_decode(dtype: torch.dtype, kind: str, dim: int) -> None:
    """As above, for the way back."""
    rows, (table,) = rows_of(CHUNKS), maps_of(kind, dim, 1)
    x = rand(rows.tables.shape[0], HEADS * dim, dtype=dtype, seed=3)
    got = decode(x, rows.tables, table, HEADS)
    want = decode_reference(x.double(), rows.tables, table, HEADS)
    bound = (8e-3 if dtype is torch.bfloat16 else 4e-6) * (want.abs() + want.pow(2).mean().sqrt())
    assert bool(((got.double() - want).abs() <= bound).all())
    assert kind == "matrix" or same_bits(got, decode_reference(x, rows.tables, table, HEADS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_know_the_batch(dtype: torch.dtype, kind: str) -> None:
    """Alone, in a crowd, on one thread or three."""
    if dtype not in OPS:
        pytest.skip("this CPU has no kernels of this type; PyTorch's promise nothing about batches")
    dim = 64
    rows, maps, (table,) = rows_of(CHUNKS), maps_of(kind, dim, 3), maps_of(kind, dim, 1)
    qkv, cos_sin = projections(dtype, dim, rows.positions.shape[0]), angles(TOKENS, dim)
    k, v = slab(SLOTS, TOKENS, GROUPS, dim, dtype)
    q = encode_store(qkv, cos_sin, rows, (maps[0], maps[1], maps[2]), k, v, HEADS)
    out = decode(q.flatten(1), rows.tables, table, HEADS)
    for threads, first, last in ((1, 0, 34), (3, 0, 34), (2, 0, 1), (2, 8, 10), (3, 33, 34)):
        native.set_threads(threads)
        some = Rows(*(column[first:last].clone() for column in rows))
        other_k, other_v = slab(SLOTS, TOKENS, GROUPS, dim, dtype)
        again = encode_store(qkv[first:last], cos_sin, some, (maps[0], maps[1], maps[2]), other_k, other_v, HEADS)
        where = (some.slots.long(), some.positions.long())
        assert same_bits(again, q[first:last])
        assert same_bits(other_k[where], k[where]) and same_bits(other_v[where], v[where])
        assert same_bits(decode(again.flatten(1), some.tables, table, HEADS), out[first:last])


def test_arguments_are_checked() -> None:
    """Wrong shapes and types are ValueErrors, places and tables outside are IndexErrors with value and range."""
    dtype, dim = torch.float32, 16
    if dtype not in OPS:
        pytest.skip("the references check nothing")
    rows, maps = rows_of(CHUNKS), maps_of("order", dim, 3)
    qkv, cos_sin = projections(dtype, dim, rows.positions.shape[0]), angles(TOKENS, dim)
    k, v = slab(SLOTS, TOKENS, GROUPS, dim, dtype)

    def call(rows: Rows = rows, maps: list[torch.Tensor] = maps, qkv: torch.Tensor = qkv) -> None:
        encode_store(qkv, cos_sin, rows, (maps[0], maps[1], maps[2]), k, v, HEADS)

    call()
    for bad in ([maps[0], maps[1], maps[2].int()], [maps[0], maps[1][:1], maps[2]], maps_of("order", 8, 3),
                [*maps_of("matrix", dim, 1), *maps[1:]]):  # fmt: skip
        with pytest.raises(ValueError, match="a map is"):
            call(maps=bad)
    with pytest.raises(ValueError, match="qkv"):
        call(qkv=qkv[:-1])
    for name, value, said in (("tables", SLOTS, r"tables\[0\]=4 is outside 0\.\.3"), ("slots", -1, "slots_of_token"),
                              ("positions", TOKENS, "positions")):  # fmt: skip
        column = getattr(rows, name).clone()
        column[0] = value
        with pytest.raises(IndexError, match=said):
            call(rows=rows._replace(**{name: column}))
    with pytest.raises(IndexError, match="tables"):
        decode(torch.zeros(1, HEADS * dim), torch.tensor([9], dtype=torch.int32), maps[0], HEADS)
