"""Check and time the GPU's kernels: `python -m scripts.gpu_kernels [--sections check,decode,...] [--json PATH]`.

Sections: check (every operation against float64), rows, decode, prefill, gemv, gemm, layer; of the vendor's products
products, library and search (scripts/gpu_library.py) and sustained (scripts/gpu_power.py); of whole backends
(scripts/gpu_phases.py) phases, paged, sample; scx (encoded layers). Each variant of a kernel is timed in a CUDA graph
over rotating buffers; the table prints its speed, its share of the measured ceiling and the library beside it. The
settings that win go into the JSON file; as kernels/tuning/<device>.json the kernels use them. A variant that fails is
reported by its error's first line and left out. Shapes are Llama-3-8B's.
"""

# mypy: disable-error-code="misc"
# (lambdas bind loop variables by default arguments, whose types mypy does not infer)

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention.base import backends
from scripts import gpu_backend_checks, gpu_checks, gpu_scx_kernels, gpu_timing, gpu_variants
from scripts.benching.environment import heading
from scripts.gpu_timing import Report, show
from scripts.gpu_trial import Session
from scripts.gpu_variants import DIM, FFN, HEADS, KV_HEADS, LAYERS, PRODUCTS, VOCAB, WIDTH, weights_of
from tessera_kernels import cublaslt, triton_gemm, triton_gemv, triton_support
from tessera_kernels.triton_argmax import RowArgmax
from tessera_kernels.triton_attention_decode import DecodeConfig, DecodeWorkspace, attention_decode, line_up
from tessera_kernels.triton_attention_prefill import PrefillConfig, attention_prefill
from tessera_kernels.triton_rmsnorm import rmsnorm
from tessera_kernels.triton_rope_store import rope_store
from tessera_kernels.triton_silu_mul import silu_mul

BF16 = torch.bfloat16


def section_check(s: Session) -> None:
    """Every operation against float64 on fresh data."""
    if s.compile_only:
        return
    tried: list[tuple[str, Callable[[], gpu_checks.Found]]] = []
    for dtype in (BF16, torch.float32):
        bench = gpu_checks.Bench("cuda", dtype)
        for heads in gpu_checks.HEADS if dtype is BF16 else gpu_checks.HEADS[:1]:
            for window in (0, 50):
                tried.append((f"decode {heads} {dtype}", partial(gpu_checks.check_decode, bench, *heads, window)))
                tried.append((f"prefill {heads} {dtype}", partial(gpu_checks.check_prefill, bench, *heads, window)))
        tried.append((f"rows {dtype}", partial(gpu_checks.check_rows, bench, WIDTH, 9, 3, 64)))
        tried.append((f"products {dtype}", partial(gpu_checks.check_products, bench, 1024, WIDTH)))
        for kind in gpu_scx_kernels.KINDS:
            for heads in gpu_checks.HEADS if dtype is BF16 else gpu_checks.HEADS[:1]:
                tried.append((f"{kind} {heads} {dtype}", partial(gpu_scx_kernels.check_heads, bench, kind, *heads)))
    bench = gpu_checks.Bench("cuda", BF16)
    attended = [(name, heads) for name in backends if backends[name].caps.device == "cuda"
                for heads in gpu_backend_checks.shapes_for(name)]  # fmt: skip
    tried += [(f"{name} {heads}", partial(gpu_backend_checks.check_backend, bench, name, *heads))
              for name, heads in attended if name.startswith("triton")]  # fmt: skip
    built = [found for _, found in tried]
    tried += [("graph", partial(gpu_checks.check_graph, bench)), ("library", partial(gpu_checks.check_library, bench))]
    rest = [(name, heads) for name, heads in attended if not (name.startswith("triton") or backends[name].missing())]
    tried += [(f"{name} {heads}", partial(gpu_backend_checks.check_backend, bench, name, *heads))
              for name, heads in rest]  # fmt: skip
    if torch.cuda.mem_get_info()[0] >= gpu_backend_checks.LONG_BYTES:
        tried += [(f"long {name}", partial(gpu_backend_checks.check_long, bench, name))
                  for name in ("triton_vattn", "fa_vattn", "fi_vattn") if not backends[name].missing()]  # fmt: skip
    s.compile([lambda f=found: list(f()) for found in built])  # what comes out is nonsense here; what is built stays
    passed = wrong = 0
    for name, found in tried:
        try:
            for what, error, bound in found():
                passed += error <= bound
                if not error <= bound:
                    wrong += 1
                    s.report.failures.append(f"WRONG {name}: {what}: {error:.3g} > {bound:.3g}")
                    print("  WRONG", name, what, error, flush=True)
        except Exception as error:
            s.report.fail(f"check {name}", error)
            print("  FAILED", s.report.failures[-1], flush=True)
    print(f"  {passed} checks passed, {wrong} wrong", flush=True)


def section_rows(s: Session) -> None:
    """The small operations at 1, 64 and 256 rows."""
    weight = s.normal(WIDTH)
    angles = s.normal(8192, 2, DIM // 2, dtype=torch.float32)
    memory = s.normal(2, 256, 1024, 1, KV_HEADS, DIM)
    argmax = RowArgmax(256, VOCAB, s.device)
    for m in (1, 64, 256):
        x, residual, parts = s.normal(m, WIDTH), s.normal(m, WIDTH), s.normal(4, m, WIDTH, dtype=torch.float32)
        qkv, both = s.normal(m, (HEADS + 2 * KV_HEADS) * DIM), s.normal(m, 2 * FFN)
        logits = s.normal(m, VOCAB, dtype=torch.float32)
        positions, slots = s.ints([i % 1000 for i in range(m)]), s.ints(list(range(m)))
        k, v = memory[0, :, :, 0], memory[1, :, :, 0]
        calls: dict[str, tuple[gpu_timing.Call, float]] = {
            "norm": (lambda i, x=x: rmsnorm(x, weight, 1e-5), m * WIDTH * 4),
            "norm + residual": (lambda i, x=x, r=residual: rmsnorm(x, weight, 1e-5, r), m * WIDTH * 8),
            "norm + residual, 4 parts": (lambda i, p=parts, r=residual: rmsnorm(p, weight, 1e-5, r), m * WIDTH * 22),
            "rope + store": (lambda i, a=qkv, p=positions, t=slots, k=k, v=v: rope_store(a, angles, p, t, k, v, HEADS),
                             m * 6144 * 4),
            "silu * up": (lambda i, b=both: silu_mul(b), m * FFN * 6),
            "argmax": (lambda i, t=logits: argmax(t), m * VOCAB * 4),
            "* torch argmax": (lambda i, t=logits: t.argmax(-1), m * VOCAB * 4),
        }  # fmt: skip
        s.compile([lambda c=call: c(0) for call, _ in calls.values()])
        for name, (call, nbytes) in calls.items():
            s.time("rows", f"M={m} {name}", name, call, 1, nbytes=nbytes, calls=20)
            show(s.report.rows[-1:] if not s.compile_only else [])


def _slab(s: Session, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (S, C, L, G, D), mega."""
    both = s.normal(2, sequences, tokens, LAYERS, KV_HEADS, DIM)
    return both[0], both[1]


def section_decode(s: Session) -> None:
    """Decode attention: every setting at every batch; the best by the geometric mean of its times."""
    rng = torch.Generator().manual_seed(7)
    chat = torch.randint(60, 3000, (256,), generator=rng).tolist()
    batches = {"64x2048": [2048] * 64, "64x8192": [8192] * 64, "8x32768": [32768] * 8, "1x32768": [32768],
               "256x384": [384] * 256, "256 of 60-3000": chat, "1x768": [768], "16x1024": [1024] * 16}  # fmt: skip
    configs = gpu_variants.DECODE[:4] if s.quick else gpu_variants.DECODE
    totals = dict.fromkeys(configs, 0.0)
    for name, lengths in batches.items():
        room = max(lengths)
        k, v = _slab(s, len(lengths), room)
        q, slots, lens = s.normal(len(lengths), HEADS, DIM), s.ints(list(range(len(lengths)))), s.ints(lengths)
        out = torch.empty(len(lengths), HEADS * DIM, dtype=BF16, device=s.device)

        def call(config: DecodeConfig, spaces: dict[DecodeConfig, DecodeWorkspace] = {},  # noqa: B006
                 k=k, v=v, q=q, slots=slots, lens=lens, out=out) -> gpu_timing.Call:  # fmt: skip
            space = spaces.setdefault(config, DecodeWorkspace.make(q, HEADS, KV_HEADS, DIM, 512, k.shape[1], config))

            def layer(i: int) -> None:
                if i == 0:  # once a step, and a step has LAYERS layers here
                    line_up(slots, lens, space)
                attention_decode(q, k[:, :, i], v[:, :, i], DIM**-0.5, space, out=out)

            return layer

        s.compile([lambda c=config: call(c)(0) for config in configs])
        nbytes = sum(lengths) * KV_HEADS * DIM * 4
        for config in configs:
            us = s.time("decode", name, str(astuple_text(config)), call(config), LAYERS, nbytes=nbytes)
            totals[config] += math.log(us) if us < math.inf else math.inf
        if len(set(lengths)) == 1:
            _flash_decode(s, name, q, lengths, nbytes)
        s.show_best("decode", name)
        del k, v
    best = min(totals, key=lambda config: totals[config])
    if totals[best] < math.inf and not s.compile_only:
        s.report.settings["attention_decode"] = {str(DIM): asdict(best)}
        print("  best overall:", best, flush=True)


def _flash_decode(s: Session, name: str, q: torch.Tensor, lengths: list[int], nbytes: int) -> None:
    """FlashAttention 3 on contiguous KV of exactly these lengths, beside ours."""
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except ImportError:
        return
    buffers = max(1, min(LAYERS, (1 << 28) // nbytes))
    caches = [s.normal(2, len(lengths), lengths[0], KV_HEADS, DIM) for _ in range(buffers)]
    s.time("decode", name, "* FlashAttention 3, contiguous",
           lambda i: flash_attn_with_kvcache(q[:, None], caches[i][0], caches[i][1], causal=True), buffers,
           nbytes=nbytes, calls=LAYERS)  # fmt: skip


def astuple_text(config: Any) -> str:
    """key=value of a setting, short."""
    return " ".join(f"{key[:5]}={value}" for key, value in asdict(config).items())


def section_prefill(s: Session) -> None:
    """Chunk attention: every setting at every chunk, FlashAttention 3 beside; best by geometric mean."""
    chunks = {"2048 whole": [(0, 2048)], "8192 whole": [(0, 8192)], "512 at 8k": [(7680, 512)],
              "512 at 32k": [(32256, 512)], "2048 at 32k": [(30720, 2048)], "4 x 512 at 2k": [(1536, 512)] * 4,
              "128 at 2k": [(1920, 128)]}  # fmt: skip
    configs = gpu_variants.PREFILL[:3] if s.quick else gpu_variants.PREFILL
    totals = dict.fromkeys(configs, 0.0)
    k, v = _slab(s, 4, 32768)
    for name, work in chunks.items():
        starts = [0]
        for _, count in work:
            starts.append(starts[-1] + count)
        lengths = [start + count for start, count in work]
        q = s.normal(starts[-1], HEADS, DIM)
        slots, firsts, lens = s.ints(list(range(len(work)))), s.ints(starts), s.ints(lengths)
        flops = sum(4 * HEADS * DIM * (start * count + count * (count + 1) / 2) for start, count in work)

        def call(config: PrefillConfig, q=q, slots=slots, firsts=firsts, lens=lens) -> gpu_timing.Call:
            return lambda i: attention_prefill(q, k[:, :, i], v[:, :, i], slots, firsts, lens, DIM**-0.5,
                                               config=config)  # fmt: skip

        s.compile([lambda c=config: call(c)(0) for config in configs])
        for config in configs:
            us = s.time("prefill", name, astuple_text(config), call(config), LAYERS, flops=flops, calls=4)
            totals[config] += math.log(us) if us < math.inf else math.inf
        if len(work) == 1:
            _flash_prefill(s, name, q, k, v, lengths[0], flops)
        s.show_best("prefill", name)
    best = min(totals, key=lambda config: totals[config])
    if totals[best] < math.inf and not s.compile_only:
        s.report.settings["attention_prefill"] = {str(DIM): asdict(best)}
        print("  best overall:", best, flush=True)


def _flash_prefill(s: Session, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_len: int,
                   flops: float) -> None:  # fmt: skip
    """FlashAttention 3 on a view of exactly this length, mega stride, with and without cutting along the keys."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return
    for splits in (1, 0):
        s.time("prefill", name, f"* FlashAttention 3, exact view, num_splits={splits}",
               lambda i, n=splits: flash_attn_func(q[None], k[:1, :kv_len, i], v[:1, :kv_len, i], causal=True,
                                                   num_splits=n),
               LAYERS, flops=flops, calls=4)  # fmt: skip


def section_gemv(s: Session) -> None:
    """One row: the fused endings a layer uses, every setting, with and without an early start."""
    configs = gpu_variants.GEMV[:3] if s.quick else gpu_variants.GEMV
    for name, (rows, width, gated) in PRODUCTS.items():
        weights, x, norm = weights_of(s, name), s.normal(1, width), s.normal(width)
        onto = s.normal(1, rows)
        options: dict[str, Any] = {"gated": gated}
        if name in ("qkv", "gate_up"):
            options |= {"norm": norm, "eps": 1e-5}
        if name in ("o", "down"):
            options |= {"add_to": onto}
        if name == "head":
            options |= {"float_out": True}

        def call(config: triton_gemv.GemvConfig, pdl: bool, w=weights, x=x, o=options) -> gpu_timing.Call:
            return lambda i: triton_gemv.gemv(x, w[i], config=config, pdl=pdl, **o)

        nbytes, times = weights[0].numel() * 2, dict.fromkeys(configs, math.inf)
        for pdl in (False, True):
            tried = sorted(configs, key=lambda config: times[config])[:3] if pdl else configs
            s.compile([lambda c=config, p=pdl: call(c, p)(0) for config in tried])
            for config in tried:
                us = s.time("gemv", name, f"{astuple_text(config)} pdl={int(pdl)}", call(config, pdl), len(weights),
                            nbytes=nbytes, calls=16)  # fmt: skip
                times[config] = min(times[config], us)
        best = min((us, index) for index, us in enumerate(times.values()))
        s.time("gemv", name, "* cuBLAS, the product alone", lambda i, w=weights, x=x: F.linear(x, w[i]), len(weights),
               nbytes=nbytes, calls=16)  # fmt: skip
        s.show_best("gemv", name, 4)
        if best[0] < math.inf:
            s.report.settings.setdefault("gemv", {})[f"{rows}x{width}{'g' if gated else ''}"] = asdict(configs[best[1]])
        del weights


def section_gemm(s: Session) -> None:
    """2 to 256 rows: every setting that fits, cuBLAS beside; the table gets a setting only where it wins by 2 %."""
    sizes = (16, 128) if s.quick else (4, 16, 32, 64, 128, 192, 256)
    for name, (rows, width, gated) in PRODUCTS.items():
        weights = weights_of(s, name)
        table: dict[str, Any] = {}
        for m in sizes:
            if name == "head" and m in (4, 32, 192):
                continue
            x, onto = s.normal(m, width), s.normal(m, rows)
            configs = gpu_variants.gemm(m, gated, head=name == "head")

            def call(config: triton_gemm.GemmConfig, x=x, onto=onto, w=weights, name=name, gated=gated
                     ) -> gpu_timing.Call:  # fmt: skip
                if config.parts > 1 and name in ("qkv", "o"):  # the reader sums the parts
                    return lambda i: triton_gemm.linear_parts(x, w[i], config=config)
                if name in ("o", "down"):
                    return lambda i: triton_gemm.gemm(x, w[i], config=config, add_to=onto)
                return lambda i: triton_gemm.gemm(x, w[i], config=config, gated=gated, float_out=name == "head")

            s.compile([lambda c=config: call(c)(0) for config in configs])
            flops = 2.0 * m * weights[0].numel()
            best: tuple[float, triton_gemm.GemmConfig | None] = (math.inf, None)
            nbytes = weights[0].numel() * 2 + m * (width + rows) * 2
            shape = f"{name} M={m}"
            for config in configs:
                us = s.time("gemm", shape, astuple_text(config), call(config), len(weights), nbytes=nbytes,
                            flops=flops, calls=8)  # fmt: skip
                if config.parts > 1 and name in ("qkv", "o"):
                    us += config.parts * m * rows * 4 / 3e6  # what the reader pays, about 3 TB/s from the cache
                best = min(best, (us, config), key=lambda pair: pair[0])

            def library(i: int, x=x, onto=onto, w=weights, name=name, gated=gated) -> object:
                add_to = onto if name in ("o", "down") else None
                y = cublaslt.measured_matmul(x, w[i], add_to=add_to, float_out=name == "head")
                if y is not None:
                    return silu_mul(y) if gated else y
                if name == "head":
                    return torch.mm(x, w[i].t(), out_dtype=torch.float32)
                if name in ("o", "down"):
                    return onto.addmm_(x, w[i].t(), beta=0.5)
                return silu_mul(F.linear(x, w[i])) if gated else F.linear(x, w[i])

            theirs = s.time("gemm", shape, "* cuBLAS, same work", library, len(weights), nbytes=nbytes, flops=flops,
                            calls=8)  # fmt: skip
            s.show_best("gemm", shape, 2)
            won = best[0] < 0.98 * theirs
            table[str(m)] = asdict(best[1]) if won and best[1] is not None else {}
        if not s.compile_only:
            s.report.settings.setdefault("gemm", {})[f"{rows}x{width}{'g' if gated else ''}"] = table
        del weights


def section_layer(s: Session) -> None:
    """A whole decoder layer, fused, against its floor; with the settings found so far, and with cuBLAS only."""
    from scripts import gpu_layer

    gpu_layer.measure(s)


def section_of(file: str, which: str) -> Callable[[Session], None]:
    """A section that has a file with others."""
    def run(s: Session) -> None:
        getattr(importlib.import_module(f"scripts.{file}"), which)(s)

    return run


SECTIONS: dict[str, Callable[[Session], None]] = {
    "check": section_check, "rows": section_rows, "decode": section_decode, "prefill": section_prefill,
    **{name: section_of("gpu_library", name) for name in ("products", "library", "search")},
    "sustained": section_of("gpu_power", "sustained"),
    "gemv": section_gemv, "gemm": section_gemm, "layer": section_layer,
    **{name: section_of("gpu_phases", name) for name in ("phases", "paged", "sample")},
    "scx": gpu_scx_kernels.measure,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the sections asked for. Exit status 1 when a check was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="where results and settings go")
    parser.add_argument("--settings", type=Path, help="a file of an earlier run whose settings to start from")
    parser.add_argument("--quick", action="store_true", help="few variants")
    parser.add_argument("--compile-only", action="store_true",
                        help="build every variant, run none; without a GPU: for sm_90")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that compile")
    asked = parser.parse_args(arguments)
    chosen = asked.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    device = "cpu" if asked.compile_only else "cuda"
    if asked.compile_only and not torch.cuda.is_available():
        gpu_timing.pretend_sm90()
    report = Report(*((1.0, 1.0) if asked.compile_only else gpu_timing.ceilings()))
    if asked.settings:
        report.settings.update(json.loads(asked.settings.read_text(encoding="utf-8")).get("settings", {}))
    # later sections run with what earlier ones found, whatever file this device has
    triton_support.tuning = lambda name: report.settings  # type: ignore[assignment]
    print(f"copy {report.copy_gbytes_s:.0f} GB/s, product {report.product_tflops_s:.0f} TFLOP/s", flush=True)
    session = Session(report, device, compile_only=asked.compile_only, quick=asked.quick, workers=asked.workers)
    seconds: dict[str, float] = {}
    head = heading("gpu_kernels", f"kernels: {asked.sections}", arguments) if asked.json else {}
    for name in chosen:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                SECTIONS[name](session)
        except Exception as error:
            report.fail(f"section {name}", error)
        seconds[name] = round(time.perf_counter() - began, 1)
        if asked.json:
            head |= {"device": torch.cuda.get_device_name() if device == "cuda" else device,
                     "torch": torch.__version__, "seconds": seconds}  # fmt: skip
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(head | report.as_dict(), indent=1) + "\n", encoding="utf-8")
    print("seconds:", seconds)
    for line in report.failures:
        print("failed:", line)
    return int(any(line.startswith("WRONG") for line in report.failures))


if __name__ == "__main__":
    raise SystemExit(main())
