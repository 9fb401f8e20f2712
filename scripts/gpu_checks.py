"""Each GPU kernel against a reference in float64 on fresh random data: what tests/gpu and scripts.gpu_kernels share.

A check is a function that yields (name, relative error, bound). Outputs are filled with NaN before each run, and every
row of a slab at or past a sequence's length holds NaN, so that one element too few or too many shows. On a machine
without a GPU the same checks run under Triton's interpreter (TRITON_INTERPRET=1), in float32 and float16.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tessera_kernels import cublaslt, triton_gemm, triton_gemv
from tessera_kernels.rope_store import rope_store_reference
from tessera_kernels.silu_mul import silu_mul_reference
from tessera_kernels.triton_argmax import RowArgmax
from tessera_kernels.triton_attention_decode import DecodeConfig, DecodeWorkspace, attention_decode, line_up
from tessera_kernels.triton_attention_prefill import PrefillConfig, attention_prefill, measured_config
from tessera_kernels.triton_rmsnorm import rmsnorm, rmsnorm_parts_reference
from tessera_kernels.triton_rope_store import rope_store
from tessera_kernels.triton_silu_mul import silu_mul

Found = Iterator[tuple[str, float, float]]
BOUND = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# (query heads, kv heads, head size): groups of 1..16, every head size we promise
HEADS = [(32, 8, 128), (8, 8, 64), (9, 3, 64), (4, 2, 80), (12, 2, 96), (16, 1, 128), (14, 2, 64), (8, 4, 256)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, infinite where anything is not finite."""
    got, want = got.double().cpu(), want.double().cpu()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def judge(found: Found) -> None:
    """Raise AssertionError for what is over its bound, and for checks that checked nothing."""
    results = list(found)
    over = [f"{name}: {error:.3g} > {bound:.3g}" for name, error, bound in results if not error <= bound]
    if over or not results:
        raise AssertionError("\n".join(over) or "nothing was checked")


class Bench:
    """A device, an element type and a source of fresh numbers."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.draw = random.Random(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Fresh normal values."""
        source = torch.Generator(device=self.device).manual_seed(self.draw.getrandbits(40))
        return (torch.randn(*shape, generator=source, device=self.device) * scale).to(self.dtype)

    def poison(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """NaN everywhere."""
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device)

    def ints(self, values: list[int]) -> torch.Tensor:
        """(len,) int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def slab(self, lengths: list[int], kv_heads: int, dim: int, layers: int) -> SimpleNamespace:
        """k, v (S, C, G, D) of the middle layer of a mega slab (layers > 0) or of a per-layer one, and slots (B,).
        Rows at and past a length are NaN; slots are in random order, some unused."""
        slots = self.draw.sample(range(len(lengths) + 2), len(lengths))
        width = max(1, layers)
        memory = self.poison(2, len(lengths) + 2, max(lengths) + 9, width, kv_heads, dim)
        for slot, length in zip(slots, lengths, strict=True):
            memory[:, slot, :length] = self.normal(2, length, width, kv_heads, dim)
        return SimpleNamespace(k=memory[0, :, :, width // 2], v=memory[1, :, :, width // 2], slots=self.ints(slots))


KEYS_AT_ONCE = 2048  # of the reference: with 512 queries of 32 heads a block of scores is 268 MB


def attention_want(q: torch.Tensor, slab: SimpleNamespace, starts: list[int], lengths: list[int], window: int
                   ) -> torch.Tensor:  # fmt: skip
    """(N, H * D) float64, computed where q lies, over blocks of keys with a running maximum.

    q (N, H, D); slab: k, v (S, C, G, D) and slots (B,); starts: B + 1 token rows of the chunks; lengths: B.
    """
    heads, dim = q.shape[1:]
    groups = slab.k.shape[2]
    out = torch.empty(q.shape[0], groups, heads // groups, dim, dtype=torch.float64, device=q.device)
    for b, (slot, length) in enumerate(zip(slab.slots.tolist(), lengths, strict=True)):
        first, last = starts[b], starts[b + 1]
        rows = q[first:last].double().view(last - first, groups, heads // groups, dim) * dim**-0.5
        position = torch.arange(length - (last - first), length, device=q.device)
        top = torch.full((last - first, groups, heads // groups, 1), float("-inf"), dtype=torch.float64,
                         device=q.device)  # fmt: skip
        norm, total = torch.zeros_like(top), torch.zeros_like(rows)
        for begin in range(0, length, KEYS_AT_ONCE):
            end = min(length, begin + KEYS_AT_ONCE)
            k, v = (side[slot, begin:end].double() for side in (slab.k, slab.v))  # (T, G, D)
            key = torch.arange(begin, end, device=q.device)
            hidden = key[None] > position[:, None]  # (n, T)
            if window > 0:
                hidden |= key[None] <= position[:, None] - window
            scores = torch.einsum("ngrd,tgd->ngrt", rows, k)
            scores.masked_fill_(hidden[:, None, None], float("-inf"))
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            anchor = new_top.clamp_min(-1e300)  # a block may hold no key that a query sees
            weights, keep = (scores - anchor).exp_(), (top - anchor).exp()
            norm = norm * keep + weights.sum(-1, keepdim=True)
            total = total * keep + torch.einsum("ngrt,tgd->ngrd", weights, v)
            top = new_top
        out[first:last] = total / norm
    return out.view(q.shape[0], heads * dim)


def decode_lengths(tile: int) -> list[int]:
    """Lengths around every edge of a key tile."""
    return [1, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile, 5 * tile + 3, 7]


def check_decode(bench: Bench, heads: int, kv_heads: int, dim: int, window: int = 0) -> Found:
    """Decode attention on ragged lengths, whole and cut, in both layouts; a sequence of length 0 in the middle."""
    for layers in (0, 3):
        config = None if bench.device != "cpu" else DecodeConfig(keys=16)
        q0 = bench.normal(1, heads, dim)
        tile = (config or DecodeWorkspace.make(q0, heads, kv_heads, dim, 1, 1).config).keys
        lengths = decode_lengths(tile)
        bench.draw.shuffle(lengths)
        slab = bench.slab(lengths, kv_heads, dim, layers)
        q = bench.normal(len(lengths), heads, dim)
        workspace = DecodeWorkspace.make(q, heads, kv_heads, dim, len(lengths) + 1, max(lengths), config, window)
        workspace.partial.fill_(float("nan"))
        want = attention_want(q, slab, list(range(len(lengths) + 1)), lengths, window)
        line_up(slab.slots, bench.ints(lengths), workspace)
        for run in range(2):  # again: counters must be back at zero
            out = bench.poison(len(lengths), heads * dim)
            attention_decode(q, slab.k, slab.v, dim**-0.5, workspace, out=out)
            yield f"decode {heads}/{kv_heads}x{dim} w{window} L{layers} #{run}", relative(out, want), BOUND[bench.dtype]
        idle = 3
        with_idle = [*lengths[:idle], 0, *lengths[idle + 1 :]]
        out = bench.poison(len(lengths), heads * dim)
        line_up(slab.slots, bench.ints(with_idle), workspace)
        attention_decode(q, slab.k, slab.v, dim**-0.5, workspace, out=out)
        kept = [i for i in range(len(lengths)) if i != idle]
        yield f"decode {heads}/{kv_heads}x{dim} idle row", relative(out[kept], want[kept]), BOUND[bench.dtype]


def check_prefill(bench: Bench, heads: int, kv_heads: int, dim: int, window: int = 0) -> Found:
    """Chunks of 1 token and many, at the start of a prompt and deep in it, through both ways of loading."""
    chunks = [(0, 5), (10, 1), (0, 33), (63, 17), (64, 1), (0, 128), (127, 2), (40, 100)]
    for bulk in (True, False):
        bench.draw.shuffle(chunks)
        lengths = [start + count for start, count in chunks]
        slab = bench.slab(lengths, kv_heads, dim, layers=3 if bulk else 0)
        starts = [0]
        for _, count in chunks:
            starts.append(starts[-1] + count)
        q = bench.normal(starts[-1], heads, dim)
        config = PrefillConfig(rows=64, keys=32, warps=4, bulk=bulk)
        if bench.device != "cpu":
            config = replace(measured_config(q, dim), bulk=bulk and bench.dtype is not torch.float32)
        out = bench.poison(starts[-1], heads * dim)
        attention_prefill(q, slab.k, slab.v, slab.slots, bench.ints(starts), bench.ints(lengths), dim**-0.5, window,
                          out=out, config=config)  # fmt: skip
        want = attention_want(q, slab, starts, lengths, window)
        yield f"prefill {heads}/{kv_heads}x{dim} w{window} bulk={bulk}", relative(out, want), BOUND[bench.dtype]


def check_rows(bench: Bench, width: int, heads: int, kv_heads: int, dim: int) -> Found:
    """Norm (with residual, of parts), rotary store (with padding), SiLU and argmax (ties, NaN, infinities)."""
    bound = BOUND[bench.dtype]
    x, w, residual = bench.normal(5, width), bench.normal(width), bench.normal(5, width)
    parts = bench.normal(3, 5, width).float()
    yield f"norm {width}", relative(rmsnorm(x, w, 1e-5), rmsnorm_parts_reference(x.double(), w.double(), 1e-5)), bound
    for name, given in (("residual", x), ("parts", parts)):
        ours, theirs = residual.clone(), residual.double()
        got = rmsnorm(given, w, 1e-5, ours)
        want = rmsnorm_parts_reference(given.double(), w.double(), 1e-5, theirs)
        yield f"norm {width} {name}", max(relative(got, want), relative(ours, theirs)), bound
    slab = bench.slab([20, 20, 20], kv_heads, dim, layers=2)
    qkv = bench.normal(5, (heads + 2 * kv_heads) * dim)
    angles = torch.randn(29, 2, dim // 2, device=bench.device)
    positions, slots = bench.ints([0, 3, 28, 7, 7]), bench.ints([0, 1, 2, 0, -1])
    want_k, want_v = slab.k.double().cpu(), slab.v.double().cpu()
    kept = slots >= 0
    q = rope_store(qkv, angles, positions, slots, slab.k, slab.v, heads)
    want_q = rope_store_reference(qkv[kept].double().cpu(), angles.double().cpu(), positions[kept].cpu(),
                                  slots[kept].cpu(), want_k, want_v, heads)  # fmt: skip
    wrote = torch.cat([slab.k.cpu().double(), slab.v.cpu().double()]).nan_to_num(0.0)
    should = torch.cat([want_k, want_v]).nan_to_num(0.0)
    yield f"rope {heads}/{kv_heads}x{dim}", max(relative(q[kept], want_q), relative(wrote, should)), bound
    both = bench.normal(3, 2 * width)
    yield f"silu {width}", relative(silu_mul(both), silu_mul_reference(both.double())), bound
    logits = torch.randn(6, 9001, device=bench.device)
    logits[0, 5] = logits[0, 8000] = 99.0
    logits[1, 4500], logits[2], logits[3, 9000] = float("nan"), float("-inf"), 50.0
    argmax = RowArgmax(8, 10_000, bench.device)
    for _ in range(2):
        wrong = int((argmax(logits)[0].cpu() != logits.cpu().argmax(dim=-1)).sum())
        yield "argmax", float(wrong), 0.5


def check_products(bench: Bench, rows: int, width: int) -> Found:
    """One-row and few-row products with every ending, odd row counts included; rows: weight rows, a multiple of 64."""
    bound = BOUND[bench.dtype]
    for gated in (False, True):
        weight = bench.normal(rows * (2 if gated else 1), width, scale=width**-0.5)
        bias, norm = bench.normal(weight.shape[0]), bench.normal(width)
        for m in (1, 3, 16, 70, 130):
            x, add = bench.normal(m, width), bench.normal(m, rows)
            want = triton_gemm.gemm_reference(x.double(), weight.double(), bias.double(), gated=gated)
            config = triton_gemm.default_config(m, bench.dtype)
            choices: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
            for parts in (1,) if gated else (1, 3):
                setting = triton_gemm.GemmConfig(config.m, config.n, config.k, parts, 4, config.stages, config.turned)
                choices.append((f"gemm m={m} parts={parts}", triton_gemm.gemm, {"config": setting, "gated": gated}))
            if m == 1:
                choices.append(("gemv", triton_gemv.gemv, {"gated": gated}))
                normed = triton_gemv.gemv_reference(x.double(), weight.double(), bias.double(), norm=norm.double(),
                                                    eps=1e-5, gated=gated)  # fmt: skip
                got = triton_gemv.gemv(x, weight, bias, norm=norm, eps=1e-5, gated=gated)
                yield f"gemv norm gated={gated} {rows}x{width}", relative(got, normed), bound
            for name, call, options in choices:
                yield f"{name} gated={gated}", relative(call(x, weight, bias, **options), want), bound
                got = call(x, weight, bias, float_out=True, **options)
                yield f"{name} gated={gated} float", relative(got, want), bound
                onto = add.clone()
                call(x, weight, bias, add_to=onto, **options)
                yield f"{name} gated={gated} add", relative(onto, want + add.double()), bound


def check_library(bench: Bench) -> Found:
    """Every proposal of cuBLASLt for a few shapes: plain, added onto, and in float32. CUDA only."""
    for m, n, k in ((448, 1024, 512), (96, 640, 2048), (17, 256, 256)):
        x, weight, onto = bench.normal(m, k), bench.normal(n, k, scale=k**-0.5), bench.normal(m, n)
        want = x.double() @ weight.double().t()
        for float_out in (False, True):
            dtype = torch.float32 if float_out else bench.dtype
            for rank in range(len(cublaslt.product(m, n, k, bench.dtype, dtype).proposals)):
                name = f"library {m}x{n}x{k} #{rank}{' float' if float_out else ''}"
                got = cublaslt.matmul(x, weight, rank, float_out=float_out)
                yield name, relative(got, want.cpu()), BOUND[bench.dtype]
                if not float_out:
                    got = cublaslt.matmul(x, weight, rank, add_to=onto.clone())
                    yield f"{name} added", relative(got, (want + onto.double()).cpu()), BOUND[bench.dtype]


def check_graph(bench: Bench) -> Found:
    """A captured decode follows lengths, slots and queries that change between replays. CUDA only."""
    heads, kv_heads, dim, sequences = 32, 8, 128, 12
    slab = bench.slab([900] * sequences, kv_heads, dim, layers=2)
    q, out = bench.normal(sequences, heads, dim), bench.poison(sequences, heads * dim)
    lens, slots = bench.ints([1] * sequences), slab.slots.clone()
    workspace = DecodeWorkspace.make(q, heads, kv_heads, dim, sequences, 900)

    def step() -> None:
        line_up(slots, lens, workspace)
        attention_decode(q, slab.k, slab.v, dim**-0.5, workspace, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for turn in range(4):
        lengths = [bench.draw.randint(1, 900) for _ in range(sequences)]
        lens.copy_(bench.ints(lengths))
        q.copy_(bench.normal(sequences, heads, dim))
        slots.copy_(slab.slots[torch.randperm(sequences, device=bench.device)])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        shuffled = SimpleNamespace(k=slab.k, v=slab.v, slots=slots)
        want = attention_want(q, shuffled, list(range(sequences + 1)), lengths, 0)
        yield f"decode graph, replay {turn}", relative(out, want), BOUND[bench.dtype]
