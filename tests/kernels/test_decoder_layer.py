"""The fused layer against its parts, bit for bit, and a stack of layers under every way to cut a prompt."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from tessera_kernels import native
from tessera_kernels.decoder_layer import DecoderLayer, LayerWeights, Ragged
from tessera_kernels.linear import PackedLinear
from tests.kernels.cases import DTYPES, Chunk, angles, ragged, rand, same_bits, slab

WIDTH, HEADS, KV_HEADS, DIM, FFN, SLOTS, TOKENS = 96, 6, 2, 32, 160, 4, 200


@pytest.fixture(params=[(dtype, narrow) for dtype in DTYPES for narrow in (False, True)], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each element type, on this CPU's kernels and on those of a CPU without AVX-512."""
    dtype, narrow = request.param
    if narrow:
        monkeypatch.setitem(native.OPS, dtype, native.extension().Ops(dtype.itemsize, True))
    return dtype


def make_layer(kv: torch.Tensor, dtype: torch.dtype, *, bias: bool, interleaved: bool, window: int) -> DecoderLayer:
    """A layer of seeded weights over `kv` (2, S, C, G, D)."""

    def linear(rows: int, columns: int, seed: int, *, gate_up: bool = False) -> PackedLinear:
        weight = rand(rows, columns, dtype=dtype, seed=seed, scale=columns**-0.5)
        return PackedLinear(weight, rand(rows, dtype=dtype, seed=seed + 1) if bias else None, gate_up=gate_up)

    weights = LayerWeights(
        input_norm=1 + rand(WIDTH, dtype=dtype, seed=20, scale=0.1),
        qkv=linear((HEADS + 2 * KV_HEADS) * DIM, WIDTH, 1),
        attn_out=linear(WIDTH, HEADS * DIM, 3),
        post_norm=1 + rand(WIDTH, dtype=dtype, seed=21, scale=0.1),
        gate_up=linear(2 * FFN, WIDTH, 5, gate_up=True),
        down=linear(WIDTH, FFN, 7),
    )
    return DecoderLayer(weights, angles(TOKENS, DIM), kv[0], kv[1], HEADS, eps=1e-5, scale=DIM**-0.5, window=window,
                        interleaved=interleaved)  # fmt: skip


@pytest.mark.parametrize(("bias", "interleaved", "window"), [(False, False, 0), (True, True, 0), (True, False, 20)])
def test_the_fused_layer_equals_its_parts(dtype: torch.dtype, bias: bool, interleaved: bool, window: int) -> None:
    """Residual and slab, after prefill, chunk and decode steps."""
    native.set_threads(2)
    sides = [slab(SLOTS, TOKENS, KV_HEADS, DIM, dtype, layers=3) for _ in range(2)]
    fused, parts = (make_layer(kv, dtype, bias=bias, interleaved=interleaved, window=window) for kv in sides)
    steps = ([Chunk(0, 0, 0, 70), Chunk(1, 2, 0, 5)], [Chunk(0, 0, 70, 1), Chunk(1, 2, 5, 1), Chunk(2, 3, 0, 130)],
             [Chunk(0, 0, 71, 1), Chunk(1, 2, 6, 1), Chunk(2, 3, 130, 1)])  # fmt: skip
    for number, chunks in enumerate(steps):
        batch = Ragged(**ragged(chunks))
        x = rand(len(batch.positions), WIDTH, dtype=dtype, seed=30 + number)
        y = x.clone()
        fused(x, batch)
        parts.run_steps(y, batch)
        assert same_bits(x, y), number
        assert same_bits(sides[0], sides[1]), number


def prompt_outputs(layers: list[DecoderLayer], x: torch.Tensor, sizes: list[int], slot: int) -> torch.Tensor:
    """The stack over a prompt x (T, C) cut into `sizes`; other slots decode beside it when T allows."""
    outputs, start = [], 0
    for length in sizes:
        chunks = [Chunk(0, slot, start, length), Chunk(1, slot - 1, start, 1)]
        company = rand(1, WIDTH, dtype=x.dtype, seed=start)
        rows = torch.cat((x[start : start + length], company))
        for layer in layers:
            layer(rows, Ragged(**ragged(chunks)))
        outputs.append(rows[:length])
        start += length
    return torch.cat(outputs)


def test_a_prompt_has_the_same_bits_however_it_is_cut(dtype: torch.dtype) -> None:
    """Through a whole stack: in one piece, in chunks of 1, 7 and 64, beside other rows, and at 1 or 2 threads."""
    x = rand(150, WIDTH, dtype=dtype, seed=40)
    whole = None
    for sizes in ([150], [1] * 150, [7] * 21 + [3], [64, 64, 22], [149, 1], [1, 60, 89]):
        native.set_threads(1 + len(sizes) % 2)
        kv = [slab(SLOTS, TOKENS, KV_HEADS, DIM, dtype) for _ in range(3)]
        for side in kv:  # the company attends over rows nobody wrote
            side.fill_(0.5)
        layers = [make_layer(side, dtype, bias=True, interleaved=False, window=0) for side in kv]
        out = prompt_outputs(layers, x, sizes, slot=2)
        whole = out if whole is None else whole
        assert same_bits(out, whole), sizes


@pytest.mark.skipif(not native.isa(torch.float32).startswith("avx512"), reason="no AVX-512 to compare with here")
def test_the_kernels_of_avx2_are_close_to_the_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 with and without AVX-512 differs by rounding only."""
    outs = []
    for narrow in (False, True):
        monkeypatch.setitem(native.OPS, torch.float32, native.extension().Ops(4, narrow))
        kv = slab(SLOTS, TOKENS, KV_HEADS, DIM, torch.float32)
        layer = make_layer(kv, torch.float32, bias=True, interleaved=True, window=30)
        outs.append(layer(rand(150, WIDTH, dtype=torch.float32, seed=40), Ragged(**ragged([Chunk(0, 0, 0, 150)]))))
    assert not same_bits(*outs), "the narrow kernels did not run"
    assert (outs[0] - outs[1]).abs().max().item() < 1e-5


def test_two_python_threads_take_turns() -> None:
    """Regions queue for the one pool while others change its size; every result is right."""
    weight = rand(300, 64, dtype=torch.float32, seed=1)
    linear, x = PackedLinear(weight), rand(40, 64, dtype=torch.float32, seed=2)
    want, wrong = linear(x), []

    def work() -> None:
        for _ in range(200):
            if not same_bits(linear(x), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for threads in (1, 3, 2, 4, 1, 2) * 5:
        native.set_threads(threads)
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_process_ends_while_workers_sleep() -> None:
    """Workers are asleep or spinning at exit, and the interpreter still ends with 0 and says nothing."""
    script = (
        "import torch; from tessera_kernels import native; from tessera_kernels.silu_mul import silu_mul\n"
        "native.set_threads(4); silu_mul(torch.zeros(64, 64))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_layer_that_does_not_fit_is_refused() -> None:
    """Shapes are checked when the layer is made, indices when it runs."""
    kv = slab(SLOTS, TOKENS, KV_HEADS, DIM, torch.float32)
    layer = make_layer(kv, torch.float32, bias=False, interleaved=False, window=0)
    w = layer.weights
    wrong = LayerWeights(w.input_norm, w.attn_out, w.attn_out, w.post_norm, w.gate_up, w.down)
    with pytest.raises(ValueError, match="qkv is"):
        DecoderLayer(wrong, layer.cos_sin, kv[0], kv[1], HEADS, eps=1e-5, scale=1.0)
    batch = Ragged(**ragged([Chunk(0, 0, 0, 2)]))
    with pytest.raises(ValueError):
        layer(torch.zeros(3, WIDTH), batch)
    with pytest.raises(IndexError):
        layer(torch.zeros(1, WIDTH), Ragged(**ragged([Chunk(0, SLOTS, 0, 1)])))
