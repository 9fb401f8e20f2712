"""Attention over slabs: close to float64, never past kv_len, and bitwise the same however a prompt is cut."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import pytest
import torch

from tessera_kernels import native
from tessera_kernels.attention_slots import attention, attention_reference
from tests.kernels.cases import DTYPES, Chunk, ints, ragged, rand, same_bits, slab

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 4e-6}


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Each test starts from two threads, whatever the one before set."""
    native.set_threads(2)


def run(q: torch.Tensor, kv: torch.Tensor, chunks: list[Chunk], window: int = 0) -> torch.Tensor:
    """(N, H * D) for `chunks`; q holds each sequence's whole prompt, (seqs, tokens, H, D)."""
    batch = ragged(chunks)
    rows = torch.cat([q[c.seq, c.start : c.start + c.length] for c in chunks]).contiguous()
    return attention(rows, kv[0], kv[1], batch["slots"], batch["q_starts"], batch["kv_lens"],
                     q.shape[-1] ** -0.5, window)  # fmt: skip


def filled(slots: int, tokens: int, kv_heads: int, dim: int, dtype: torch.dtype, layers: int = 0) -> torch.Tensor:
    """A slab of normal values; the same ones in either layout."""
    kv = slab(slots, tokens, kv_heads, dim, dtype, layers=layers)
    kv.copy_(rand(2, slots, tokens, kv_heads, dim, dtype=dtype, seed=11))
    return kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (1, 1, 16), (2, 2, 48), (8, 1, 80), (10, 2, 96), (16, 1, 128), (14, 2, 64), (4, 2, 256), (12, 1, 32)],
)
@pytest.mark.parametrize("window", [0, 1, 70])
def test_close_to_float64(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    """Decodes and chunks together, groups of 1..16, head sizes 16..256, lengths around the 64-key blocks."""
    lengths = [(0, 1), (0, 63), (62, 1), (63, 1), (64, 1), (0, 65), (40, 100), (130, 3), (127, 2)]
    chunks = [Chunk(i, i, start, length) for i, (start, length) in enumerate(lengths)]
    q = rand(len(chunks), 160, heads, dim, dtype=dtype, seed=5)
    kv = filled(len(chunks), 160, kv_heads, dim, dtype, layers=3)
    batch = ragged(chunks)
    rows = torch.cat([q[c.seq, c.start : c.start + c.length] for c in chunks])
    want = attention_reference(rows.double(), kv[0].double(), kv[1].double(), batch["slots"], batch["q_starts"],
                               batch["kv_lens"], dim**-0.5, window)  # fmt: skip
    error = (run(q, kv, chunks, window).double() - want).abs().max().item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_size_no_vector_fits_runs_on_the_reference(dtype: torch.dtype) -> None:
    """D=40 is not a multiple of 16."""
    q, kv = rand(1, 9, 4, 40, dtype=dtype, seed=1), filled(1, 9, 2, 40, dtype)
    batch = ragged([Chunk(0, 0, 0, 9)])
    want = attention_reference(q[0], kv[0], kv[1], batch["slots"], batch["q_starts"], batch["kv_lens"], 40**-0.5)
    assert same_bits(run(q, kv, [Chunk(0, 0, 0, 9)]), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(9, 3, 64, 0), (9, 3, 64, 100), (8, 8, 80, 0), (16, 1, 128, 0), (7, 1, 64, 33), (4, 2, 256, 0), (28, 4, 16, 0)],
)
def test_bits_do_not_depend_on_the_batch(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    """Whole prompts, random chunks of 1, 7, 64, in random company, at 1..3 threads and in either layout: the same
    bits for every token. Decodes run alone, in pairs (cut for more units) and in crowds (all heads at once)."""
    draw = random.Random(heads * dim + window)
    lengths = [300, 129, 65, 64, 1, 31, 200, 97, 250]
    q = rand(len(lengths), 300, heads, dim, dtype=dtype, seed=5)
    kv = filled(len(lengths), 300, kv_heads, dim, dtype)
    mega = filled(len(lengths), 300, kv_heads, dim, dtype, layers=2)
    whole = [run(q, kv, [Chunk(s, s, 0, n)], window) for s, n in enumerate(lengths)]
    for sizes in ((1,), (7,), (64,), (1, 1, 1, 2, 7, 64, 500)):
        done = [0] * len(lengths)
        if sizes == (1,):  # decodes: the last ones only, or this takes long
            done = [max(0, n - 5) for n in lengths]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            ready = [s for s in range(len(lengths)) if done[s] < lengths[s]]
            chosen = draw.sample(ready, draw.randint(1, len(ready)))
            chunks = [Chunk(s, s, done[s], min(draw.choice(sizes), lengths[s] - done[s])) for s in chosen]
            native.set_threads(draw.choice((1, 2, 3)))
            out, at = run(q, draw.choice((kv, mega)), chunks, window), 0
            for c in chunks:
                expected = whole[c.seq][c.start : c.start + c.length]
                assert same_bits(out[at : at + c.length], expected), (c, sizes)
                at += c.length
                done[c.seq] += c.length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1500])
def test_long_contexts_keep_their_bits(dtype: torch.dtype, window: int) -> None:
    """Past 1,024 keys partial results are combined: alone they go to different threads, in a crowd they do not, and
    a chunk that crosses the boundary does both."""
    tokens, heads, kv_heads, dim = 3000, 6, 2, 32
    q, kv = rand(9, tokens, heads, dim, dtype=dtype, seed=5), filled(1, tokens, kv_heads, dim, dtype, layers=2)
    q[:] = q[0]
    starts = (0, 1000, 1023, 1024, 1025, 2047, 2048, 2500, tokens - 1)
    crowd = run(q, kv, [Chunk(s, 0, start, 1) for s, start in enumerate(starts)], window)
    chunk = run(q, kv, [Chunk(0, 0, 1000, 1100)], window)
    for i, start in enumerate(starts):
        alone = run(q, kv, [Chunk(0, 0, start, 1)], window)
        assert same_bits(alone, crowd[i : i + 1]), start
        if 1000 <= start < 2100:
            assert same_bits(alone, chunk[start - 1000 : start - 999]), start
    want = attention_reference(q[0, -1:].double(), kv[0].double(), kv[1].double(), ints([0]), ints([0, 1]),
                               ints([tokens]), dim**-0.5, window)  # fmt: skip
    assert (crowd[-1:].double() - want).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wild_scores_stay_finite(dtype: torch.dtype) -> None:
    """Scores of +-1e4 underflow all but one weight; nothing becomes inf or NaN, and close to the best key's value."""
    q, kv = rand(1, 200, 2, 64, dtype=dtype, seed=5, scale=100.0), filled(1, 200, 1, 64, dtype)
    kv[0] *= 100.0
    out = run(q, kv, [Chunk(0, 0, 0, 200)])
    want = attention_reference(q[0].double(), kv[0].double(), kv[1].double(), ints([0]), ints([0, 200]),
                               ints([200]), 64**-0.5)  # fmt: skip
    assert bool(out.isfinite().all())
    assert (out.double() - want).abs().max().item() <= 0.05


def test_wrong_lengths_are_refused() -> None:
    """Slots, lengths and starts are checked before they become addresses."""
    q, kv = torch.zeros(2, 2, 16), slab(2, 8, 1, 16, torch.float32)

    def attempt(slots: list[int], starts: list[int], lens: list[int], window: int = 0) -> None:
        attention(q, kv[0], kv[1], ints(slots), ints(starts), ints(lens), 1.0, window)

    attempt([1], [0, 2], [8])
    for arguments in (([2], [0, 2], [8]), ([-1], [0, 2], [8]), ([0], [0, 2], [9]), ([0], [0, 2], [1]),
                      ([0], [0, 1], [8]), ([0], [1, 2], [8]), ([0, 1], [0, 3, 2], [8, 8])):  # fmt: skip
        with pytest.raises(IndexError):
            attempt(*arguments)
    with pytest.raises(ValueError):
        attempt([0, 1], [0, 2], [8])
    with pytest.raises(ValueError):
        attempt([0], [0, 2], [8], -1)


GUARDED = """
    import ctypes, mmap, sys, torch
    from tests.kernels.cases import ints, rand
    from tessera_kernels import native
    from tessera_kernels.attention_slots import attention
    from tessera_kernels.rope_store import rope_store
    dtype, kv_heads, group, dim, past = torch.{dtype}, {kv_heads}, {group}, {dim}, {past}
    libc = ctypes.CDLL(None, use_errno=True)
    native.set_threads(2)
    row = kv_heads * dim * (torch.finfo(dtype).bits // 8)
    page = mmap.PAGESIZE
    for kv_len in (1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 1024, 1025, 1100):
        sides = []
        nbytes = (kv_len * row + page - 1) // page * page
        for _ in range(2):
            memory = mmap.mmap(-1, nbytes + 4 * page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert libc.mprotect(ctypes.c_void_p(address + nbytes), 4 * page, 0) == 0
            # the last row ends where the readable memory ends
            offset = nbytes - kv_len * row
            flat = torch.frombuffer(memory, dtype=dtype, offset=offset, count=kv_len * kv_heads * dim)
            flat.copy_(rand(flat.numel(), dtype=dtype, seed=1))
            shape, strides = (1, kv_len + 8, kv_heads, dim), (flat.numel(), kv_heads * dim, dim, 1)
            whole = torch.frombuffer(memory, dtype=dtype, offset=offset)
            sides.append((memory, torch.as_strided(whole, shape, strides)))
        k, v = sides[0][1], sides[1][1]
        for q_len in {{1, min(kv_len, 70), kv_len}}:
            q = rand(q_len, group * kv_heads, dim, dtype=dtype, seed=2)
            attention(q, k, v, ints([0]), ints([0, q_len]), ints([kv_len + past]), 0.1)
        many = rand(9, group * kv_heads, dim, dtype=dtype, seed=2)
        attention(many, k, v, ints([0] * 9), ints(list(range(10))), ints([kv_len + past] * 9), 0.1)
        qkv = rand(1, (group + 2) * kv_heads * dim, dtype=dtype, seed=3)
        table, last = torch.ones(kv_len + past, 2, dim // 2), ints([kv_len - 1 + past])
        rope_store(qkv, table, last, ints([0]), k, v, group * kv_heads)
    print("untouched")
"""


def guarded(**values: object) -> subprocess.CompletedProcess[str]:
    """GUARDED in an interpreter of its own: a fault kills that one."""
    script = textwrap.dedent(GUARDED).format(**values)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 3, 64), (1, 1, 16), (1, 12, 80), (2, 4, 128)])
def test_memory_past_the_last_row_is_never_touched(dtype: str, kv_heads: int, group: int, dim: int) -> None:
    """The last row of K and of V ends exactly at PROT_NONE, for lengths around every block and tile edge, for
    decodes, chunks and crowds."""
    done = guarded(dtype=dtype, kv_heads=kv_heads, group=group, dim=dim, past=0)
    assert done.returncode == 0 and "untouched" in done.stdout, done.stderr[-2000:]


def test_the_guard_would_notice() -> None:
    """One token more than is readable does fault, so the test above can fail."""
    assert guarded(dtype="bfloat16", kv_heads=3, group=3, dim=64, past=1).returncode < 0
