"""How near each CPU kernel comes to what the machine allows: `python -m scripts.bench_kernels [--threads 2]`.

One row an operation: time, its floor (bytes over the measured read speed or operations over the measured product
speed, whichever is longer), per cent of that floor's speed, and torch's time for the same work, measured in turns so
that noise meets both. Times are the least of many. Weights and slabs rotate through more memory than the caches hold.
The shapes are SmolLM2-135M's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F

from tessera_kernels import native
from tessera_kernels.argmax import argmax
from tessera_kernels.attention_slots import attention
from tessera_kernels.decoder_layer import DecoderLayer, LayerWeights, Ragged
from tessera_kernels.linear import PackedLinear
from tessera_kernels.rmsnorm import rmsnorm, rmsnorm_reference
from tessera_kernels.rope_store import rope_store, rope_store_reference
from tessera_kernels.silu_mul import silu_mul, silu_mul_reference

LAYERS, WIDTH, HEADS, KV_HEADS, DIM, FFN, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
QKV = (HEADS + 2 * KV_HEADS) * DIM
COLD_BYTES = 96 << 20  # more than the last-level cache
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measured operation; torch_us is 0 where torch has no counterpart."""

    op: str
    shape: str
    us: float
    gbytes_s: float
    gflops_s: float
    floor_percent: float
    torch_us: float


@dataclass(frozen=True)
class Ceilings:
    """What this machine did at its best, with this many threads and this element type."""

    read_gbytes_s: float
    product_gflops_s: float


def least_us(ours: Sequence[Call], theirs: Sequence[Call], budget_s: float) -> tuple[float, float]:
    """Least time of a call of each, in microseconds, over alternating rounds within `budget_s`."""
    best = [float("inf"), float("inf")]
    deadline, turn = time.perf_counter() + budget_s, 0
    while turn < 3 or time.perf_counter() < deadline:
        for side, calls in enumerate((ours, theirs)):
            if calls:
                call = calls[(turn + side * len(calls) // 2) % len(calls)]  # never what the other side just warmed
                start = time.perf_counter_ns()
                call()
                best[side] = min(best[side], (time.perf_counter_ns() - start) / 1e3)
        turn += 1
    return best[0], best[1] if theirs else 0.0


def copies(nbytes: int) -> int:
    """How many of them are colder than the caches, at most 64."""
    return max(1, min(64, -(-COLD_BYTES // nbytes)))


def separate_silu_mul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's way to gate and up."""
    return silu_mul_reference(F.linear(x, weight))


def ints(values: Sequence[int]) -> torch.Tensor:
    """(len,) int32."""
    return torch.tensor(values, dtype=torch.int32)


class Bench:
    """Runs and prints rows; holds what they share."""

    def __init__(self, dtype: torch.dtype, budget_s: float) -> None:
        self.dtype, self.budget_s, self.rows = dtype, budget_s, list[Row]()
        self.element_bytes = torch.empty(0, dtype=dtype).element_size()
        self.ceilings = self._measure_ceilings()

    def rand(self, *shape: int) -> torch.Tensor:
        """Normal values, small enough to stay tame through a layer."""
        return (torch.randn(*shape) * 0.05).to(self.dtype)

    def _measure_ceilings(self) -> Ceilings:
        big = torch.ones(64 << 20, dtype=torch.int64)  # 512 MiB
        wide = PackedLinear(self.rand(131072, WIDTH))
        one, x, square = self.rand(1, WIDTH), self.rand(480, 1024), self.rand(1024, 1024)
        packed = PackedLinear(square)
        ours_us, torch_us = least_us([lambda: wide(one)], [big.sum], 4 * self.budget_s)
        read = max(131072 * WIDTH * self.element_bytes / ours_us, big.numel() * 8 / torch_us) / 1e3
        product_us = min(least_us([lambda: packed(x)], [lambda: F.linear(x, square)], 4 * self.budget_s))
        return Ceilings(read, 2 * 480 * 1024 * 1024 / product_us / 1e3)

    def add(self, op: str, shape: str, nbytes: float, flops: float, ours: Sequence[Call],
            theirs: Sequence[Call] = ()) -> None:  # fmt: skip
        """Measure and print one row. nbytes: memory that must be read or written; flops: multiply and add count 2."""
        us, torch_us = least_us(ours, theirs, self.budget_s)
        floor_us = max(nbytes / self.ceilings.read_gbytes_s, flops / self.ceilings.product_gflops_s) / 1e3
        row = Row(op, shape, us, nbytes / us / 1e3, flops / us / 1e3, 100 * floor_us / us, torch_us)
        self.rows.append(row)
        beside = f"{torch_us:10.1f} {torch_us / us:6.2f}x" if theirs else f"{'-':>10} {'-':>7}"
        print(f"{op:<14}{shape:<26}{us:10.1f}{row.gbytes_s:8.1f}{row.gflops_s:9.0f}{row.floor_percent:8.0f}  {beside}",
              flush=True)  # fmt: skip

    def products(self, m: int) -> None:
        """The five products of the model at M rows."""
        shapes = {"qkv": (QKV, WIDTH), "attn_out": (WIDTH, HEADS * DIM), "down": (WIDTH, FFN), "head": (VOCAB, WIDTH)}
        for name, (n, k) in shapes.items():
            if name == "head" and m > 64:
                continue
            self._product(name, m, n, k)
        self._gate_up(m)

    def _product(self, name: str, m: int, n: int, k: int) -> None:
        weight_bytes = n * k * self.element_bytes
        weights = [self.rand(n, k) for _ in range(copies(weight_bytes))]
        packed, x = [PackedLinear(w) for w in weights], self.rand(m, k)
        ours = [partial(p.logits if name == "head" else p, x) for p in packed]
        out_bytes = m * n * (4 if name == "head" else self.element_bytes)
        self.add(name, f"M={m} N={n} K={k}", weight_bytes + out_bytes, 2.0 * m * n * k, ours,
                 [partial(F.linear, x, w) for w in weights])  # fmt: skip

    def _gate_up(self, m: int) -> None:
        weight_bytes = 2 * FFN * WIDTH * self.element_bytes
        weights = [self.rand(2 * FFN, WIDTH) for _ in range(copies(weight_bytes))]
        packed, x = [PackedLinear(w, gate_up=True) for w in weights], self.rand(m, WIDTH)
        self.add("gate_up+silu", f"M={m} N={2 * FFN} K={WIDTH}", weight_bytes, 4.0 * m * FFN * WIDTH,
                 [partial(p.silu_mul, x) for p in packed],
                 [partial(separate_silu_mul, x, w) for w in weights])  # fmt: skip

    def attention(self, name: str, sequences: int, q_len: int, kv_len: int, layers: int) -> None:
        """A uniform batch over `layers` layers of a mega slab, in turns; torch runs SDPA on contiguous K and V."""
        kv = self.rand(2, sequences, kv_len, layers, KV_HEADS, DIM)
        q = self.rand(sequences * q_len, HEADS, DIM)
        batch = (ints(range(sequences)), ints([q_len * i for i in range(sequences + 1)]), ints([kv_len] * sequences))
        ours = [partial(attention, q, kv[0, :, :, i], kv[1, :, :, i], *batch, DIM**-0.5) for i in range(layers)]
        dense_q = q.view(sequences, q_len, HEADS, DIM).transpose(1, 2).contiguous()
        dense = [kv[:, :, :, layer].transpose(2, 3).contiguous() for layer in range(layers)]  # (2, S, G, T, D)
        mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len) if 1 < q_len < kv_len else None
        sdpa = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=q_len == kv_len, enable_gqa=True)
        theirs = [partial(sdpa, dense_q, d[0], d[1]) for d in dense]
        pairs = q_len * (kv_len - q_len) + q_len * (q_len + 1) / 2
        nbytes = 2.0 * sequences * kv_len * KV_HEADS * DIM * self.element_bytes
        flops = 4.0 * sequences * HEADS * DIM * pairs
        self.add(name, f"{sequences} x {q_len} at {kv_len}", nbytes, flops, ours, theirs)

    def rowwise(self, n: int) -> None:
        """Norm, rope with store, SiLU at N rows; bytes are what is read and written once."""
        e, x, weight = self.element_bytes, self.rand(n, WIDTH), self.rand(WIDTH)
        self.add("rmsnorm", f"N={n} C={WIDTH}", 2.0 * n * WIDTH * e, 0, [lambda: rmsnorm(x, weight, 1e-5)],
                 [lambda: rmsnorm_reference(x, weight, 1e-5)])  # fmt: skip
        qkv, kv = self.rand(n, QKV), self.rand(2, 1, n, LAYERS, KV_HEADS, DIM)[:, :, :, 0]
        arguments = (qkv, torch.rand(n, 2, DIM // 2), ints(range(n)), ints([0] * n), kv[0], kv[1], HEADS)
        self.add("rope_store", f"N={n} H={HEADS} G={KV_HEADS}", 2.0 * n * QKV * e, 0, [lambda: rope_store(*arguments)],
                 [lambda: rope_store_reference(*arguments)])  # fmt: skip
        gate_up = self.rand(n, 2 * FFN)
        self.add("silu_mul", f"N={n} F={FFN}", 3.0 * n * FFN * e, 0, [lambda: silu_mul(gate_up)],
                 [lambda: silu_mul_reference(gate_up)])  # fmt: skip

    def layer(self, sequences: int, q_len: int, kv_len: int) -> None:
        """The fused layer beside the same layer one call at a time (in torch's column)."""
        count, e = 12, self.element_bytes
        kv = self.rand(2, sequences, kv_len, count, KV_HEADS, DIM)
        angles, batch = torch.rand(kv_len, 2, DIM // 2), uniform_batch(sequences, q_len, kv_len)
        layers = [DecoderLayer(self.layer_weights(), angles, kv[0, :, :, i], kv[1, :, :, i], HEADS, eps=1e-5,
                               scale=DIM**-0.5) for i in range(count)]  # fmt: skip
        tokens = sequences * q_len
        x = self.rand(tokens, WIDTH)
        weights = QKV * WIDTH + WIDTH * HEADS * DIM + 3 * FFN * WIDTH
        pairs = q_len * (kv_len - q_len) + q_len * (q_len + 1) / 2
        flops = 2.0 * tokens * weights + 4.0 * sequences * HEADS * DIM * pairs
        nbytes = e * (weights + 2.0 * sequences * kv_len * KV_HEADS * DIM)
        self.add("layer/steps", f"{sequences} x {q_len} at {kv_len}", nbytes, flops,
                 [partial(layer, x.clone(), batch) for layer in layers],
                 [partial(layer.run_steps, x.clone(), batch) for layer in layers])  # fmt: skip

    def layer_weights(self) -> LayerWeights:
        """One layer of the model's shape."""
        return LayerWeights(self.rand(WIDTH), PackedLinear(self.rand(QKV, WIDTH)),
                            PackedLinear(self.rand(WIDTH, HEADS * DIM)), self.rand(WIDTH),
                            PackedLinear(self.rand(2 * FFN, WIDTH), gate_up=True),
                            PackedLinear(self.rand(WIDTH, FFN)))  # fmt: skip


def uniform_batch(sequences: int, q_len: int, kv_len: int) -> Ragged:
    """`sequences` chunks of `q_len` tokens that end at `kv_len`."""
    return Ragged(
        positions=ints([kv_len - q_len + i for _ in range(sequences) for i in range(q_len)]),
        token_slots=ints([s for s in range(sequences) for _ in range(q_len)]),
        slots=ints(range(sequences)),
        q_starts=ints([q_len * i for i in range(sequences + 1)]),
        kv_lens=ints([kv_len] * sequences),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=native.threads(), help="threads of both sides")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.6, help="time spent on each row")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    native.set_threads(options.threads)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(dtype, options.seconds)
    best = bench.ceilings
    print(f"{options.dtype} on {native.isa(dtype)}, {options.threads} threads; ceilings: read "
          f"{best.read_gbytes_s:.1f} GB/s, products {best.product_gflops_s:.0f} GFLOP/s")  # fmt: skip
    print(f"{'op':<14}{'shape':<26}{'us':>10}{'GB/s':>8}{'GFLOP/s':>9}{'% floor':>8}  {'torch us':>10} {'ratio':>7}")
    for m in (1, 16, 512):
        bench.products(m)
    bench.attention("decode", 16, 1, 320, LAYERS)
    bench.attention("decode", 1, 1, 8192, 4)
    bench.attention("prefill", 2, 256, 256, LAYERS)
    bench.attention("chunk", 1, 512, 8192, 2)
    for n in (16, 512):
        bench.rowwise(n)
    logits = torch.randn(16, VOCAB)
    bench.add("argmax", f"R=16 V={VOCAB}", 4.0 * 16 * VOCAB, 0, [lambda: argmax(logits)], [lambda: logits.argmax(-1)])
    bench.layer(16, 1, 320)
    bench.layer(2, 256, 256)
    print(json.dumps({"bench": "kernels", "dtype": options.dtype, "threads": options.threads, "isa": native.isa(dtype),
                      "machine": platform.machine(), "torch": torch.__version__, "ceilings": asdict(bench.ceilings),
                      "rows": [asdict(row) for row in bench.rows]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
