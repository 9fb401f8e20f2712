"""Each attention backend, called as the engine calls it, against float64: random batches, the last mapped token, 128k.

Checks are as in scripts/gpu_checks.py. They know backends by name and what they declare, nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from engine.attention.base import backends
from engine.kv.slots import SlotStore
from engine.runner.batch import Batch, Paged, Row, pack
from scripts.gpu_checks import BOUND, HEADS, Bench, Found, attention_want, relative
from vattention_ext import KvAllocator, KvGeometry

LONG_TOKENS, LONG_CHUNK = 131_072, 512
# K and V of Llama-3-8B's heads in 24 layers and 2 slots: a slot has 3.2e9 elements, so both its base and places in it
# lie beyond 2^31
LONG_LAYERS, LONG_SLOTS = 24, 2
LONG_BYTES = 40 << 30  # of free memory: 26 GB of slabs and the reference's blocks


def shapes_for(name: str) -> list[tuple[int, int, int]]:
    """(query heads, kv heads, head size): those of HEADS that a backend declares, and 192 where it names sizes with
    it."""
    sizes = backends[name].caps.head_dims
    more = [(16, 2, 192)] if 192 in sizes else []
    return [shape for shape in HEADS if not sizes or shape[2] in sizes] + more


def batch_of(bench: Bench, slots: list[int], chunks: list[tuple[int, int]]) -> Batch:
    """Chunks (start, count) of those slots, on the device."""
    rows = [Row(slot, start, [0] * count, True) for slot, (start, count) in zip(slots, chunks, strict=True)]
    return pack(rows).to(torch.device(bench.device))


def blocks_of(slab: SimpleNamespace, lengths: list[int], block_tokens: int) -> SimpleNamespace:
    """The same keys and values as blocks in random order: k, v (blocks, T, G, D), and Paged's table without places."""
    _, _, kv_heads, dim = slab.k.shape
    counts = [-(-n // block_tokens) for n in lengths]
    order = torch.randperm(sum(counts) + 2).tolist()
    table = torch.zeros(slab.k.shape[0], max(counts), dtype=torch.int32)
    shape = (len(order), block_tokens, kv_heads, dim)
    k, v = (torch.full(shape, float("nan"), dtype=slab.k.dtype, device=slab.k.device) for _ in range(2))
    for slot, length, count in zip(slab.slots.tolist(), lengths, counts, strict=True):
        for m in range(count):
            block, n = order.pop(), min(block_tokens, length - m * block_tokens)
            table[slot, m] = block
            for side, whole in ((k, slab.k), (v, slab.v)):
                side[block, :n] = whole[slot, m * block_tokens : m * block_tokens + n]
    return SimpleNamespace(k=k, v=v, table=table)


def draw_mixes(bench: Bench, longest: int) -> Iterator[list[tuple[int, int]]]:
    """Chunks (start, count) of a prompt before decodes, which run beside it; of several prompts with a token alone
    among them, and decodes; of prompts only; of decodes only."""
    draw = bench.draw

    def prompts(most: int) -> list[tuple[int, int]]:
        return [(draw.choice((0, draw.randint(1, longest))), draw.randint(2, longest)) for _ in range(most)]

    def decodes() -> list[tuple[int, int]]:
        return [(draw.randint(0, 2 * longest), 1) for _ in range(draw.randint(1, 9))]

    yield [*prompts(1), *decodes()]
    yield [*prompts(2), (draw.randint(0, longest), 1), *prompts(1), *decodes()]
    yield prompts(draw.randint(2, 4))
    yield decodes()


def check_backend(bench: Bench, name: str, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Found:
    """A backend on random hybrid batches, prompts first, then decodes; on prompts only; on decodes only. Each with
    and without a window of random width. bench's seed says which batches."""
    spec: Any = SimpleNamespace(heads=heads, kv_heads=kv_heads, head_dim=dim)
    caps = backends[name].caps
    backend = backends[name](spec)
    on_cpu = bench.device == "cpu"
    mixes = list(draw_mixes(bench, 40 if on_cpu else 300))
    if not on_cpu:  # long enough that each prompt of several gets FlashAttention's launch
        mixes.append([(bench.draw.randint(900, 1500), bench.draw.randint(500, 800)) for _ in range(2)])
    for chunks in mixes:
        lengths = [start + count for start, count in chunks]
        slab = bench.slab(lengths, kv_heads, dim, layers=2)
        made = batch_of(bench, slab.slots.tolist(), chunks)
        q = bench.normal(made.num_tokens, heads, dim)
        k, v = slab.k, slab.v
        if caps.paged:
            blocks = blocks_of(slab, lengths, 16 * caps.block_multiple)
            k, v, table = blocks.k, blocks.v, blocks.table.to(bench.device)
            made.paged = Paged(table, blocks.table.numpy(), k.shape[1], made.token_slots, made.positions)
        starts = [0]
        for _, count in chunks:
            starts.append(starts[-1] + count)
        for window in (0, bench.draw.randint(1, max(lengths))):
            want = attention_want(q, slab, starts, lengths, window)
            got = backend.attend(q, k, v, made, window)
            yield f"{name} {heads}/{kv_heads}x{dim} {chunks} w{window}", relative(got, want), BOUND[bench.dtype]


def check_tail(bench: Bench, name: str, layout: str, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Found:
    """A backend over real slabs with nothing mapped beyond: lengths around page and tile edges, as one decode, as one
    chunk, and in both phases at once. One token too far is a fault that ends the process."""
    on_cpu = bench.device == "cpu"
    page_bytes = 4096 if on_cpu else 2 << 20
    spec: Any = SimpleNamespace(heads=heads, kv_heads=kv_heads, head_dim=dim)
    geometry = KvGeometry(layers=2 if on_cpu else 32, kv_heads=kv_heads, head_dim=dim,
                          element_bytes=bench.dtype.itemsize, max_tokens=4096 if not on_cpu else 256, slots=4,
                          page_bytes=page_bytes, layout=layout)  # fmt: skip
    allocator = KvAllocator(geometry, "memfd" if on_cpu else "cuda", pool_groups=geometry.groups_per_slot * 4)
    store = SlotStore(geometry, allocator, bench.dtype, clear=True)
    edge = max(1, page_bytes // geometry.token_bytes)
    edges = {n + off for n in (edge, 2 * edge, 64, 128, 176, 352) for off in (-1, 0, 1)} | {1, 33, 65, 1000, 1030}
    backend = backends[name](spec)
    for length in sorted(n for n in edges if 0 < n <= min(geometry.max_tokens, 2100 if not on_cpu else 140)):
        slots = [store.borrow(length) for _ in range(2)]
        k, v = store.layer_views(geometry.layers - 1)
        for slot in slots:
            k[slot, :length] = bench.normal(length, kv_heads, dim)
            v[slot, :length] = bench.normal(length, kv_heads, dim)
        half = max(2, length // 2) if length > 1 else 1
        for chunks in ([1], [half], [half, 1]):
            batch = batch_of(bench, slots[: len(chunks)], [(length - n, n) for n in chunks])
            q = bench.normal(batch.num_tokens, heads, dim)
            got = backend.attend(q, k, v, batch, 0)
            views = SimpleNamespace(k=torch.stack([k[slot, :length] for slot in slots]),
                                    v=torch.stack([v[slot, :length] for slot in slots]),
                                    slots=torch.arange(len(chunks), dtype=torch.int32))  # fmt: skip
            want = attention_want(q, views, batch.q_starts.tolist(), [length] * len(chunks), 0)
            yield f"{name} {layout} length {length} chunks {chunks}", relative(got, want), BOUND[bench.dtype]
        for slot in slots:
            store.give_back(slot)
    store.close()


def check_long(bench: Bench, name: str) -> Found:
    """A decode over LONG_TOKENS and a chunk that ends there, in a mega layout whose places need 64 bits.

    Half of the heads find one key each that outweighs all others, so that a key left out shows; the rest average over
    all. Nothing but the sequence is a number. Without a GPU a small one of the same kind.
    """
    on_cpu = bench.device == "cpu"
    tokens, count, layers = (300, 20, 3) if on_cpu else (LONG_TOKENS, LONG_CHUNK, LONG_LAYERS)
    heads, kv_heads, dim = (4, 2, 64) if on_cpu else (32, 8, 128)
    memory = bench.poison(2, LONG_SLOTS, tokens + 1, layers, kv_heads, dim)
    k, v = memory[0, :, :, -1], memory[1, :, :, -1]  # the last layer of the last slot: the farthest places
    slot, ratio = LONG_SLOTS - 1, heads // kv_heads
    assert on_cpu or k.stride(0) > 1 << 31
    spec: Any = SimpleNamespace(heads=heads, kv_heads=kv_heads, head_dim=dim)
    backend = backends[name](spec)
    for length in (1, count):
        q = bench.normal(length, heads, dim)
        k[slot, :tokens], v[slot, :tokens] = (bench.normal(tokens, kv_heads, dim) for _ in range(2))
        finds = torch.arange(heads, device=bench.device) % ratio < ratio // 2
        seekers = q[:, finds].view(length, kv_heads, -1, dim).transpose(1, 2).reshape(-1, kv_heads, dim)
        between = bench.draw.sample(range(1, tokens - length), len(seekers))
        places = [tokens - length, 0, *between][: len(seekers)]  # each seen by every query of the chunk
        k[slot, bench.ints(places).long()] = (seekers * 2).to(bench.dtype)
        made = batch_of(bench, [slot], [(tokens - length, length)])
        got = backend.attend(q, k, v, made, 0).view(length, heads, dim)
        slab = SimpleNamespace(k=k, v=v, slots=bench.ints([slot]))
        want = attention_want(q, slab, [0, length], [tokens], 0).view(length, heads, dim)
        for kind, which in (("one key", finds), ("all keys", ~finds)):
            yield f"{name} {length} of {tokens}, {kind}", relative(got[:, which], want[:, which]), BOUND[bench.dtype]
