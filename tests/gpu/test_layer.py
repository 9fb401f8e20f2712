"""A fused decoder layer on the GPU's kernels agrees with PyTorch's kernel set, on decodes and hybrid batches.

Without a GPU it runs under Triton's interpreter, in float32: TRITON_INTERPRET=1 python -m pytest tests/gpu
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from engine.attention.torch_vattn import TorchVattn
from engine.attention.triton_vattn import TritonVattn
from engine.parts.cuda_kernels import CudaKernels
from engine.parts.layer import Attention, GatedMlp, Norm, PreNormLayer
from engine.parts.torch_kernels import TorchKernels
from engine.runner.batch import Batch, Row, pack
from engine.runner.pieces import PieceGraphs
from scripts.gpu_checks import relative
from tessera_kernels import triton_gemm

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE, BOUND = (torch.float32, 1e-5) if INTERPRETED else (torch.bfloat16, 2e-2)
HEADS, KV_HEADS, DIM, WIDTH, FFN, CAPACITY = 4, 2, 16, 64, 128, 40


def on_device(batch: Batch) -> Batch:
    """The same batch with its tensors on the device."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: value.to(DEVICE) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return replace(batch, **moved)


def layer(kernels: Any, backend: Any, weights: dict[str, torch.Tensor], slab: torch.Tensor, rope: torch.Tensor) -> Any:
    """One fused layer over layer 1 of a mega slab (2, S, C, L, G, D)."""
    attention = Attention(kernels, backend, kernels.linear(weights["qkv"], weights["bias"]),
                          kernels.linear(weights["o"]), rope, slab[0, :, :, 1], slab[1, :, :, 1], HEADS, 0)  # fmt: skip
    mlp = GatedMlp(kernels.gated_linear(weights["gate"], weights["up"]), kernels.linear(weights["down"]))
    norm = Norm(kernels, weights["norm"], 1e-5)
    return kernels.fuse(PreNormLayer(norm, attention, norm, mlp))


@pytest.mark.parametrize("table", ["library", "cut along K"])
@pytest.mark.parametrize("chunks", [[(20, 1)], [(20, 1), (0, 1), (7, 1)], [(0, 5), (10, 1), (3, 1)], [(0, 9)]])
def test_layer(monkeypatch: pytest.MonkeyPatch, table: str, chunks: list[tuple[int, int]]) -> None:
    """One row takes fused norms; more rows take the library or products in parts, summed by whoever reads them."""
    if table != "library":
        monkeypatch.setattr(triton_gemm, "measured_config", lambda x, rows, gated: triton_gemm.GemmConfig(
            m=16, n=16 if INTERPRETED else 64, k=32, parts=1 if gated else 2))  # fmt: skip
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH), "o": (WIDTH, HEADS * DIM), "gate": (FFN, WIDTH),
              "up": (FFN, WIDTH), "down": (WIDTH, FFN)}  # fmt: skip
    weights = {name: (torch.randn(*shape) * shape[1] ** -0.5).to(DEVICE, DTYPE) for name, shape in shapes.items()}
    weights["norm"] = torch.rand(WIDTH).to(DEVICE, DTYPE)
    weights["bias"] = torch.randn(shapes["qkv"][0]).to(DEVICE, DTYPE)
    slab = torch.full((2, 4, CAPACITY, 2, KV_HEADS, DIM), float("nan"), device=DEVICE, dtype=DTYPE)
    for slot, (start, _) in enumerate(chunks):
        slab[:, slot, :start] = torch.randn(2, start, 2, KV_HEADS, DIM).to(DEVICE, DTYPE)
    rope = torch.rand(CAPACITY, 2, DIM // 2, device=DEVICE)
    host = pack([Row(slot, start, [0] * count, True) for slot, (start, count) in enumerate(chunks)])
    spec: Any = SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    hidden = torch.randn(host.num_tokens, WIDTH).to(DEVICE, DTYPE)
    ours, our_slab = hidden.clone(), slab.clone()
    layer(CudaKernels(), TritonVattn(spec), weights, our_slab, rope)(ours, on_device(host))
    wide = {name: tensor.cpu().double() for name, tensor in weights.items()}
    theirs, their_slab = hidden.cpu().double(), slab.cpu().double()
    layer(TorchKernels(), TorchVattn(spec), wide, their_slab, rope.cpu())(theirs, host)
    assert relative(ours, theirs) < BOUND
    assert bool((our_slab.isnan().cpu() == their_slab.isnan()).all())
    assert relative(our_slab.nan_to_num(), their_slab.nan_to_num()) < BOUND


@pytest.mark.parametrize("samples", ["all", "first", "last", "none"])
@pytest.mark.parametrize("chunks", [[(0, 5), (10, 1), (3, 1)], [(0, 9)], [(4, 30), (0, 2), (20, 1)]])
def test_pieces_between_attentions(chunks: list[tuple[int, int]], samples: str) -> None:
    """Two layers cut at their attentions, padded to a recorded size, give what they give whole, and store no more,
    whichever rows get logits."""
    wanted = {"all": range(len(chunks)), "first": [0], "last": [len(chunks) - 1], "none": []}[samples]
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH), "o": (WIDTH, HEADS * DIM), "gate": (FFN, WIDTH),
              "up": (FFN, WIDTH), "down": (WIDTH, FFN)}  # fmt: skip
    weights = {name: (torch.randn(*shape) * shape[1] ** -0.5).to(DEVICE, DTYPE) for name, shape in shapes.items()}
    weights["norm"] = torch.rand(WIDTH).to(DEVICE, DTYPE)
    weights["bias"] = torch.randn(shapes["qkv"][0]).to(DEVICE, DTYPE)
    rope, table = torch.rand(CAPACITY, 2, DIM // 2, device=DEVICE), torch.randn(50, WIDTH).to(DEVICE, DTYPE)
    slab = torch.full((2, 4, CAPACITY, 2, KV_HEADS, DIM), float("nan"), device=DEVICE, dtype=DTYPE)
    for slot, (start, _) in enumerate(chunks):
        slab[:, slot, :start] = torch.randn(2, start, 2, KV_HEADS, DIM).to(DEVICE, DTYPE)
    spec: Any = SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    host = pack([Row(slot, start, [7 + slot] * count, slot in wanted) for slot, (start, count) in enumerate(chunks)])
    batch, found, more = on_device(host), [], 5 if wanted else 0  # rows for nobody: a recorded step has as many
    for split in (False, True):
        memory = slab.clone()
        layers = [layer(CudaKernels(), TritonVattn(spec), weights, memory, rope) for _ in range(2)]
        model: Any = SimpleNamespace(layers=layers, embed=lambda ids: table[ids.long()],
                                     logits=lambda rows: rows.float())  # fmt: skip
        if split:
            record = (lambda work: work) if INTERPRETED else None
            pieces = PieceGraphs(model, torch.device(DEVICE), 48, heads=HEADS, head_dim=DIM, record=record)
            pieces.capture()
            assert pieces.fits(batch)
            logits = pieces(on_device(host.widened(len(wanted) + more)))
            assert logits.shape == (len(wanted) + more, WIDTH)
            found.append((logits[: len(wanted)], memory))
        else:
            hidden = table[batch.tokens.long()]
            for one in layers:
                one(hidden, batch)
            found.append((model.logits(hidden[batch.sample_rows.long()]), memory))
    assert relative(found[1][0], found[0][0]) < BOUND
    assert bool((found[0][1].isnan() == found[1][1].isnan()).all())
