"""The kernels of encoded layers against float64 on fresh data, and their times: what tests/gpu and the session share.

Checks are as in scripts/gpu_checks.py: functions that yield (name, relative error, bound), outputs and slabs filled
with NaN first. Tables are strided by slot, as an engine's are, slots come in runs and one by one, and one is of no
slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.scx.attention import shuffle_blocks
from engine.scx.secure import SealOrder
from scripts.gpu_checks import BOUND, Bench, Found, relative
from scripts.gpu_variants import DIM, HEADS, KV_HEADS, LAYERS
from tessera_kernels.head_maps import Rows, decode_reference, encode_reference
from tessera_kernels.triton_decode_heads import decode_heads
from tessera_kernels.triton_encode_heads import encode_store
from tessera_kernels.triton_seal import BlockShuffle

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

KINDS = ("orders", "matrices")
SLOTS = 9
RUNS = [(3, 6), (0, 1), (-1, 1), (5, 7), (8, 1), (1, 1), (2, 1), (-1, 2), (4, 3)]  # (slot, tokens) of a step


def tables(bench: Bench, kind: str, groups: int, dim: int, count: int = 4) -> list[torch.Tensor]:
    """`count` maps (SLOTS, G, D[, D]) that lie behind one another for each slot."""
    if kind == "orders":
        drawn = torch.rand(SLOTS, count, groups, dim).argsort(dim=-1).to(torch.int16)
    else:  # of condition 2 or so, which keeps sizes
        drawn = torch.randn(SLOTS, count, groups, dim, dim) * (0.3 * dim**-0.5) + torch.eye(dim)
    return list(drawn.to(bench.device).unbind(1))


def check_heads(bench: Bench, kind: str, heads: int, groups: int, dim: int) -> Found:
    """Encoding into both layouts from every kind of projection, then decoding; rows of no slot leave no trace."""
    bound = BOUND[bench.dtype]
    for one_each in (False, True):
        runs = [(slot, 1) for slot in (3, -1, 0, 8, 5, 7, 1)] if one_each else RUNS
        slots = [slot for slot, count in runs for _ in range(count)]
        positions = [i for slot, count in runs for i in range(slot + 4, slot + 4 + count)]
        kept = torch.tensor([i for i, slot in enumerate(slots) if slot >= 0])
        q_map, k_map, v_map, out_map = tables(bench, kind, groups, dim)
        angles = torch.randn(40, 2, dim // 2, device=bench.device)
        own = Rows(*(torch.tensor(column, dtype=torch.int32)[kept] for column in (positions, slots, slots)))
        width = (heads + 2 * groups) * dim
        exact = torch.randn(3, len(slots), width, device=bench.device)
        for source in ("rounded", "float32", "parts"):
            given = {"rounded": exact[0].to(bench.dtype), "float32": exact[0], "parts": exact}[source]
            summed = given.sum(0).to(bench.dtype) if source == "parts" else given
            memory = bench.poison(2, SLOTS, 30, 3, groups, dim)
            k, v = memory[0, :, :, 1], memory[1, :, :, 1]
            out = bench.poison(len(slots), heads, dim)
            encode_store(given, angles, bench.ints(positions), bench.ints(slots), (q_map, k_map, v_map), k, v, heads,
                         one_each=one_each, out=out)  # fmt: skip
            want = encode_reference(summed.double().cpu()[kept], angles.double().cpu(), own, q_map.cpu(), k_map.cpu(),
                                    v_map.cpu(), heads)
            want_k, want_v = (torch.full(k.shape, float("nan"), dtype=torch.float64) for _ in range(2))
            where = (own.slots.long(), own.positions.long())
            want_k[where], want_v[where] = want[:, heads : heads + groups], want[:, heads + groups :]
            stored = all(bool((x.isnan().cpu() == y.isnan()).all()) for x, y in ((k, want_k), (v, want_v)))
            errors = [relative(out.cpu()[kept], want[:, :heads]), float(out.isnan().sum()),
                      *(relative(x.nan_to_num(), y.nan_to_num()) for x, y in ((k, want_k), (v, want_v)))]
            name = f"{kind} {heads}/{groups}x{dim} {source} one each={one_each}"
            yield f"encode {name}", max(errors) if stored else float("inf"), bound
        attended = bench.normal(len(slots), heads * dim)
        got = decode_heads(attended, bench.ints(slots), out_map, heads, one_each=one_each)
        want = decode_reference(attended.double().cpu()[kept], own.tables, out_map.cpu(), heads)
        yield f"decode {kind} {heads}/{groups}x{dim} one each={one_each}", relative(got.cpu()[kept], want), bound


def check_shuffle(bench: Bench, size: int) -> Found:
    """Blocks of two layers change places in one launch; what is in no block stays. Bit for bit."""
    groups, dim = 4, 128
    memory = bench.normal(2, SLOTS, 2 * size + 5, 3, groups, dim)
    slabs = [(memory[0, :, :, i], memory[1, :, :, i]) for i in (2, 0)]
    slots, firsts = torch.tensor([3, 0, 3]), torch.tensor([size, 0, 0])
    order = torch.rand(2, 3, groups, size).argsort(dim=-1)
    want = memory.cpu().clone()
    for orders, layer in zip(order, (2, 0), strict=True):
        shuffle_blocks(want[0, :, :, layer], want[1, :, :, layer], SealOrder(slots, firsts, orders))
    BlockShuffle(slabs)(*(made.int().to(bench.device) for made in (slots, firsts, order)))
    yield f"shuffle of blocks of {size}", float((memory.cpu() != want).sum()), 0.0


def measure(s: Session) -> None:
    """Encoding and decoding of Llama-3-8B's heads beside the plain store: decodes of 1 to 256, chunks of 512, 2048;
    and blocks of 16 tokens of all layers shuffled."""
    from tessera_kernels.triton_rope_store import rope_store

    width, most = (HEADS + 2 * KV_HEADS) * DIM, 256
    angles = s.normal(8192, 2, DIM // 2, dtype=torch.float32)
    memory = s.normal(2, most, 2200, 1, KV_HEADS, DIM)
    k, v = memory[0, :, :, 0], memory[1, :, :, 0]
    for kind in KINDS:
        shape, dtype = ((KV_HEADS, DIM), torch.int16) if kind == "orders" else ((KV_HEADS, DIM, DIM), torch.float32)
        slots_held = most if kind == "orders" else 64
        layers = LAYERS if kind == "orders" else 2
        held = [torch.zeros(slots_held, 4, *shape, dtype=dtype, device=s.device).unbind(1) for _ in range(layers)]
        for tokens, sequences in ((1, 1), (64, 64), (256, 256), (512, 1), (2048, 4), (576, 65)):
            one_each = tokens == sequences
            prompts = 0 if one_each else min(sequences, 4)
            alone = sequences if one_each else sequences - prompts  # decodes behind the prompts
            owner = [i * prompts // (tokens - alone) for i in range(tokens - alone)] if prompts else []
            owner = [slot % slots_held for slot in [*owner, *range(prompts, prompts + alone)]]
            slots, positions = s.ints(owner), s.ints([i % 2048 for i in range(tokens)])
            qkv, attended = s.normal(tokens, width), s.normal(tokens, HEADS * DIM)

            def encode(i: int, a=qkv, p=positions, t=slots, one=one_each, held=held) -> object:  # type: ignore[no-untyped-def]
                m = held[i]
                return encode_store(a, angles, p, t, (m[0], m[1], m[2]), k, v, HEADS, one_each=one)

            def decode(i: int, a=attended, t=slots, one=one_each, held=held) -> object:  # type: ignore[no-untyped-def]
                return decode_heads(a, t, held[i][3], HEADS, one_each=one)

            s.compile([lambda e=encode: e(0), lambda d=decode: d(0)])  # type: ignore[misc]
            used = min(sequences, slots_held) * held[0][0][0].nbytes
            name = f"{kind} {tokens} tokens of {sequences}"
            s.time("scx", name, "encode + store", encode, layers, nbytes=4 * tokens * width + 3 * used)
            s.time("scx", name, "decode", decode, layers, nbytes=4 * tokens * HEADS * DIM + used)
            if kind == "orders":
                s.compile([lambda a=qkv, p=positions, t=slots: rope_store(a, angles, p, t, k, v, HEADS)])  # type: ignore[misc]
                s.time("scx", name, "* plain rope + store",
                       lambda i, a=qkv, p=positions, t=slots: rope_store(a, angles, p, t, k, v, HEADS), 1,  # type: ignore[misc]
                       nbytes=4 * tokens * width, calls=8)  # fmt: skip
            s.show_best("scx", name)
    for blocks in (4, 32):
        order = torch.rand(LAYERS, blocks, KV_HEADS, 16).argsort(dim=-1).int().to(s.device)
        shuffle, slots = BlockShuffle([(k, v)] * LAYERS), s.ints(list(range(blocks)))
        s.compile([lambda f=shuffle, t=slots, o=order: f(t, t, o)])  # type: ignore[misc]
        s.time("scx", f"{blocks} blocks of 16", f"shuffle in {LAYERS} layers",
               lambda i, f=shuffle, t=slots, o=order: f(t, t, o), 1,  # type: ignore[misc]
               nbytes=8 * order.numel() * DIM)  # fmt: skip
        s.show_best("scx", f"{blocks} blocks of 16")
