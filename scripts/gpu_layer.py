"""Whole decoder layers on a GPU, as a step runs them: correct against the plain kernel set, then timed in a graph.

It builds layers from the engine's parts with random weights; there is no checkpoint, scheduler or allocator here.
"""

# mypy: disable-error-code="misc"
# (lambdas bind loop variables by default arguments, whose types mypy does not infer)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from engine.attention.triton_vattn import TritonVattn
from engine.parts.cuda_kernels import CudaKernels
from engine.parts.layer import Attention, GatedMlp, Norm, PreNormLayer
from engine.parts.torch_kernels import TorchKernels
from engine.runner.batch import Batch
from scripts.gpu_checks import relative
from tessera_kernels import cublaslt, triton_support

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

HEADS, KV_HEADS, DIM, WIDTH, FFN, LAYERS = 32, 8, 128, 4096, 14336, 8
BATCHES = [(1, 768), (16, 1024), (64, 1024), (128, 512), (256, 384)]  # (sequences, tokens cached)


def weights(s: Session) -> list[dict[str, torch.Tensor]]:
    """Each layer's tensors, scaled so that values stay near one."""
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH), "o": (WIDTH, WIDTH), "gate": (FFN, WIDTH),
              "up": (FFN, WIDTH), "down": (WIDTH, FFN)}  # fmt: skip
    made = []
    for _ in range(LAYERS):
        layer = {name: s.normal(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        layer["norm"] = s.normal(WIDTH, scale=0.1) + 1
        made.append(layer)
    return made


def decode_batch(s: Session, sequences: int, tokens: int) -> Batch:
    """One token of each of `sequences`, `tokens` cached with it."""
    slots, one = list(range(sequences)), [tokens - 1] * sequences
    rows = torch.arange(sequences, device=s.device)
    return Batch(tokens=rows, positions=s.ints(one), token_slots=s.ints(slots), slots=s.ints(slots),
                 q_starts=s.ints([*slots, sequences]), kv_lens=s.ints([tokens] * sequences),
                 sample_rows=rows)  # fmt: skip


def build(kernels: Any, backend: Any, tensors: list[dict[str, torch.Tensor]], rope: torch.Tensor,
          slab: torch.Tensor) -> list[Callable[[torch.Tensor, Batch], object]]:  # fmt: skip
    """Fused layers of one kernel set over one slab (2, S, C, L, G, D)."""
    layers = []
    for index, t in enumerate(tensors):
        attention = Attention(kernels, backend, kernels.linear(t["qkv"]), kernels.linear(t["o"]), rope,
                              slab[0, :, :, index], slab[1, :, :, index], HEADS, 0)  # fmt: skip
        mlp = GatedMlp(kernels.gated_linear(t["gate"], t["up"]), kernels.linear(t["down"]))
        norms = [Norm(kernels, t["norm"], 1e-5) for _ in range(2)]
        layers.append(kernels.fuse(PreNormLayer(norms[0], attention, norms[1], mlp)))
    return layers


def floor_bytes(sequences: int, tokens: int) -> float:
    """Fewest bytes of one layer's step: its weights once and the keys and values of every sequence."""
    values = (HEADS + 2 * KV_HEADS) * DIM * WIDTH + WIDTH * WIDTH + 3 * FFN * WIDTH
    return 2.0 * values + sequences * tokens * 2.0 * KV_HEADS * DIM * 2


def measure(s: Session) -> None:
    """Time of a layer by batch: with the settings found, with an early start, and with cuBLAS for every product."""
    spec: Any = SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    tensors = weights(s)
    rope = torch.rand(2048, 2, DIM // 2, device=s.device)
    slab = s.normal(2, max(n for n, _ in BATCHES), max(t for _, t in BATCHES), LAYERS, KV_HEADS, DIM)
    variants = {}
    for name, pdl, pdl_attention in (("settings found", False, False), ("settings found, early start", True, True),
                                     ("settings found, early start but for attention", True, False)):  # fmt: skip
        backend = TritonVattn(spec)
        backend.decode_half.pdl = pdl_attention
        variants[name] = build(CudaKernels(pdl=pdl), backend, tensors, rope, slab)
    plain = TritonVattn(spec)
    library = build(TorchKernels(), plain, tensors, rope, slab)
    judge = library[0]
    found = triton_support.tuning
    for sequences, tokens in BATCHES:
        batch = decode_batch(s, sequences, tokens)
        hidden = s.normal(sequences, WIDTH)
        shape = f"{sequences} at {tokens}"
        for name, layers in variants.items():
            scrap = hidden.clone()
            s.compile([lambda layer=layers[0], h=scrap, b=batch: layer(h, b)])
            if s.compile_only:
                continue
            batch = replace(batch)  # nothing ran yet, so nothing of this step may be taken for done
            ours, theirs = hidden.clone(), hidden.clone()
            layers[0](ours, batch)
            judge(theirs, batch)
            error = relative(ours, theirs)
            if not error < 2e-2:
                s.report.failures.append(f"WRONG layer {shape} {name}: {error:.3g} > 0.02")
            _time(s, shape, name, layers, hidden, batch)
        triton_support.tuning = lambda name: {}  # type: ignore[assignment]
        cublaslt.forget_table()
        try:
            _time(s, shape, "* our kernels without a table", variants["settings found"], hidden, batch)
            _time(s, shape, "* PyTorch's kernels, our attention", library, hidden, batch)
        finally:
            triton_support.tuning = found
            cublaslt.forget_table()
        s.show_best("layer", shape)


def _time(s: Session, shape: str, name: str, layers: list[Callable[[torch.Tensor, Batch], object]],
          hidden: torch.Tensor, batch: Batch) -> float:  # fmt: skip
    """Microseconds a layer; a graph runs all layers one after the other, as a step does."""
    state, now = hidden.clone(), [batch]

    def layer(i: int) -> None:
        if i == 0:
            state.copy_(hidden)
            now[0] = replace(batch)  # a new step
        layers[i](state, now[0])

    sequences, tokens = hidden.shape[0], int(batch.kv_lens[0]) if not s.compile_only else 1
    flops = 2.0 * sequences * (floor_bytes(0, 0) / 2)
    return s.time("layer", shape, name, layer, len(layers), nbytes=floor_bytes(sequences, tokens), flops=flops)

