"""Products and row-wise kernels: close to float64, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch

from tessera_kernels import native
from tessera_kernels.argmax import argmax, argmax_reference
from tessera_kernels.embed import embed, embed_reference
from tessera_kernels.linear import PackedLinear, linear_reference
from tessera_kernels.rmsnorm import rmsnorm, rmsnorm_reference
from tessera_kernels.rope_store import rope_store, rope_store_reference
from tessera_kernels.silu_mul import silu_mul, silu_mul_reference
from tests.kernels.cases import DTYPES, angles, ints, rand, same_bits, slab

MODEL_SHAPES = [(960, 576), (576, 576), (576, 1536)]
EDGE_SHAPES = [(1, 2), (31, 6), (33, 64), (48, 578), (100, 34)]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 2e-6}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """|got - want| <= tolerance * (|want| + its root mean square)."""
    bound = TOLERANCE[dtype] * slack * (want.abs() + want.pow(2).mean().sqrt() + 1e-9)
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max().item():.3g}"


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Each test starts from two threads, whatever the one before set."""
    native.set_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), MODEL_SHAPES + EDGE_SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_close_and_its_rows_do_not_know_each_other(
    dtype: torch.dtype, n: int, k: int, bias: bool
) -> None:
    """Rows 0..m of a batch have the bits they have alone, for every tile height and K blocking (small batches
    block K, large ones do not), any thread count and a strided x."""
    w, b = rand(n, k, dtype=dtype, seed=1, scale=k**-0.5), rand(n, dtype=dtype, seed=2) if bias else None
    linear = PackedLinear(w, b)
    x = rand(300, k, dtype=dtype, seed=3)
    whole = linear(x)
    wide = b.double() if b is not None else None
    close(whole, linear_reference(x.double(), w.double(), wide), dtype, slack=4 if dtype is torch.float32 else 1)
    for m in (*range(1, 14), 16, 24, 25, 48, 49, 100, 241):
        assert same_bits(linear(x[:m]), whole[:m]), m
    native.set_threads(1)
    assert same_bits(linear(x), whole)
    native.set_threads(3)
    padded = torch.zeros(300, k + 6, dtype=dtype)
    padded[:, :k] = x
    assert same_bits(linear(padded[:, :k]), whole)
    assert linear(x[:0]).shape == (0, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues_equal_the_separate_operations(dtype: torch.dtype) -> None:
    """logits round to the product; add_to and silu_mul are bitwise what the operations one by one give."""
    w, b = rand(1000, 64, dtype=dtype, seed=1, scale=0.1), rand(1000, dtype=dtype, seed=2)
    plain, gated = PackedLinear(w, b), PackedLinear(w, b, gate_up=True)
    for m in (1, 5, 17, 70):
        x, residual = rand(m, 64, dtype=dtype, seed=3), rand(m, 1000, dtype=dtype, seed=4)
        assert same_bits(plain.logits(x).to(dtype), plain(x))
        rows = ints([m - 1, 0])
        assert same_bits(plain.logits(x, rows), plain.logits(x)[rows.long()])
        want = residual + plain(x)
        assert plain.add_to(x, residual) is residual
        assert same_bits(residual, want)
        assert same_bits(gated.silu_mul(x), silu_mul(plain(x)))


def test_an_odd_depth_stays_with_torch() -> None:
    """Two bf16 make a word, so K=7 cannot be packed and must still be right."""
    w, x = rand(20, 7, dtype=torch.bfloat16, seed=1), rand(5, 7, dtype=torch.bfloat16, seed=2)
    linear = PackedLinear(w)
    assert not linear.native
    assert same_bits(linear(x), linear_reference(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 64, 100, 576, 4097])
def test_rmsnorm(dtype: torch.dtype, width: int) -> None:
    """Close to float64, in place on the residual, rows independent of the batch."""
    x, weight = rand(70, width, dtype=dtype, seed=1), rand(width, dtype=dtype, seed=2)
    residual = rand(70, width, dtype=dtype, seed=3)
    y = rmsnorm(x, weight, 1e-5)
    close(y, rmsnorm_reference(x.double(), weight.double(), 1e-5), dtype, slack=2)
    summed = residual.clone()
    z = rmsnorm(x, weight, 1e-5, summed)
    assert same_bits(summed, residual + x)
    assert same_bits(z, rmsnorm(summed, weight, 1e-5))
    assert same_bits(rmsnorm(x[33:34], weight, 1e-5), y[33:34])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 40, 1536])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    """Close to float64 over the range where exp would overflow, rows independent of the batch."""
    x = rand(70, 2 * width, dtype=dtype, seed=1, scale=20.0)
    x[0, 0], x[1, 0] = -300.0, 300.0
    y = silu_mul(x)
    close(y, silu_mul_reference(x.double()), dtype, slack=2)
    assert same_bits(silu_mul(x[69:]), y[69:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 64, 80, 128, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_store(dtype: torch.dtype, dim: int, interleaved: bool) -> None:
    """q, k and v land where they belong, close to float64; nothing else of the slab changes; a token alone gives
    the same bits in either layout."""
    heads, kv_heads, tokens = 6, 2, 70
    qkv = rand(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=1)
    table = angles(64, dim)
    positions, slots = ints([(7 * t) % 64 for t in range(tokens)]), ints([t // 64 for t in range(tokens)])
    mega, wanted = slab(2, 64, kv_heads, dim, dtype, layers=3), slab(2, 64, kv_heads, dim, torch.float64)
    q = rope_store(qkv, table, positions, slots, mega[0], mega[1], heads, interleaved)
    want = rope_store_reference(qkv.double(), table, positions, slots, wanted[0], wanted[1], heads, interleaved)
    close(q, want, dtype)
    close(mega[0], wanted[0], dtype)
    assert torch.equal(mega[1].double(), wanted[1])
    alone = slab(2, 64, kv_heads, dim, dtype)
    t = slice(69, 70)
    one = rope_store(qkv[t], table, positions[t], slots[t], alone[0], alone[1], heads, interleaved)
    assert same_bits(one, q[t])
    at = (int(slots[69]), int(positions[69]))
    assert same_bits(alone[0][at], mega[0][at])
    alone[0][at], alone[1][at] = 0.0, 0.0
    assert not alone.any(), "a place that no token names was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_and_argmax(dtype: torch.dtype) -> None:
    """Rows by either index type; the first of equal maxima, and a NaN, as torch decides."""
    table, ids = rand(50, 24, dtype=dtype, seed=1), torch.tensor([0, 49, 7, 7])
    assert same_bits(embed(table, ids), embed_reference(table, ids))
    assert same_bits(embed(table, ids.int()), embed_reference(table, ids))
    logits = rand(9, 1000, dtype=torch.float32, seed=2)
    logits[1, [5, 900]] = 99.0
    logits[2] = float("-inf")
    logits[3, 77] = float("nan")
    logits[4, 999] = 50.0
    assert torch.equal(argmax(logits), argmax_reference(logits))
    assert torch.equal(argmax(logits[:, :7]), argmax_reference(logits[:, :7]))


def test_wrong_arguments_are_refused() -> None:
    """A wrong shape, dtype, stride, index or thread count is an error that says so, never a read out of bounds."""
    x, weight = torch.zeros(4, 8), torch.ones(8)
    linear = PackedLinear(torch.zeros(16, 8))
    kv = slab(2, 16, 1, 8, torch.float32)
    one = ints([1])
    attempts = [
        (ValueError, lambda: linear(torch.zeros(4, 9))),
        (ValueError, lambda: linear(torch.zeros(4, 8, dtype=torch.bfloat16))),
        (ValueError, lambda: linear(torch.zeros(8, 4).t())),
        (ValueError, lambda: linear.add_to(x, torch.zeros(3, 16))),
        (ValueError, lambda: linear.silu_mul(x)),
        (ValueError, lambda: PackedLinear(torch.zeros(3, 8), gate_up=True)),
        (ValueError, lambda: PackedLinear(torch.zeros(3, 8), torch.zeros(4))),
        (ValueError, lambda: rmsnorm(x, torch.ones(9), 1e-5)),
        (ValueError, lambda: rmsnorm(x[:, ::2], weight[:4], 1e-5)),
        (ValueError, lambda: rmsnorm(x, weight, 1e-5, torch.zeros(3, 8))),
        (ValueError, lambda: silu_mul(torch.zeros(4, 7))),
        (IndexError, lambda: embed(x, torch.tensor([4]))),
        (IndexError, lambda: embed(x, torch.tensor([-1]))),
        (ValueError, lambda: embed(x, torch.tensor([1.0]))),
        (ValueError, lambda: argmax(torch.zeros(3, 0))),
        (ValueError, lambda: native.set_threads(0)),
        (IndexError, lambda: rope_store(torch.zeros(1, 24), angles(64, 8), ints([16]), one, kv[0], kv[1], 1)),
        (IndexError, lambda: rope_store(torch.zeros(1, 24), angles(4, 8), ints([4]), one, kv[0], kv[1], 1)),
        (IndexError, lambda: rope_store(torch.zeros(1, 24), angles(64, 8), one, ints([2]), kv[0], kv[1], 1)),
        (ValueError, lambda: rope_store(torch.zeros(1, 24), angles(64, 8), one.long(), one, kv[0], kv[1], 1)),
        (ValueError, lambda: rope_store(torch.zeros(1, 24), angles(64, 8), one, one, kv[0], kv[1][:1], 1)),
    ]
    for error, attempt in attempts:
        with pytest.raises(error):
            attempt()
