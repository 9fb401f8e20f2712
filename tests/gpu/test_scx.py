"""Encoded layers on the GPU's kernels give what plain ones give, run as they come, in pieces, and replayed as a whole.

Without a GPU it runs under Triton's interpreter, in float32: TRITON_INTERPRET=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from engine.attention.torch_vattn import TorchVattn
from engine.attention.triton_vattn import TritonVattn
from engine.parts.cuda_kernels import CudaKernels, CudaLayer
from engine.parts.layer import Attention, GatedMlp, Norm, PreNormLayer
from engine.parts.torch_kernels import TorchKernels
from engine.runner.batch import Batch, Row, pack
from engine.runner.pieces import PieceGraphs, Replay
from engine.scx.attention import Scx, ScxAttention
from engine.scx.config import ScxConfig
from engine.scx.errors import OutOfOrder
from engine.scx.keys import Secret
from engine.scx.on_device import DeviceSecureSide, InStreamSide, Staging
from engine.scx.on_host import HostSecureSide
from engine.scx.on_peer import PeerSecureSide
from engine.scx.remote import RemoteSecureSide
from engine.scx.schemes import maps_of
from engine.scx.secure import HeadShape, LocalSecureSide, SecureSide
from engine.scx.segments import SegmentBackend, SegmentedSide
from engine.scx.sessions import Sessions
from scripts.gpu_checks import Bench, relative
from scripts.gpu_scx_kernels import check_shuffle
from tessera_kernels import triton_gemm
from tests.scx.workers import ROOT, worker_thread

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
OTHER = "cuda:1" if torch.cuda.device_count() > 1 else str(DEVICE)  # alone, a GPU is its own other in another stream
HEADS, GROUPS, DIM, WIDTH, FFN, CAPACITY, LAYERS, SLOTS = 4, 2, 16, 64, 128, 48, 2, 4
SEAL = 8
SIDES = [DeviceSecureSide, HostSecureSide, PeerSecureSide]
SHAPE = HeadShape(HEADS, GROUPS, DIM, SLOTS, CAPACITY)
SPEC: Any = SimpleNamespace(heads=HEADS, kv_heads=GROUPS, head_dim=DIM)
# steps of (slot, start, count): prompts, both, one token each, one sequence alone
STEPS = [[(2, 0, 9), (0, 0, 3)], [(1, 0, 11), (2, 9, 1), (0, 3, 1)], [(2, 10, 1), (0, 4, 1), (1, 11, 1)], [(2, 11, 1)],
         [(2, 12, 1), (1, 12, 1)], [(2, 13, 4), (0, 5, 3), (1, 13, 3)], [(1, 16, 1), (0, 8, 1)]]  # fmt: skip


def secure_side(scheme: str, seal: int = 0, where: type[InStreamSide] = DeviceSecureSide) -> InStreamSide:
    """Both layers encoded, keys fixed."""
    device = {HostSecureSide: "cpu", PeerSecureSide: OTHER}.get(where, str(DEVICE))
    config = ScxConfig(tuple(range(LAYERS)), device, scheme, seal_tokens=seal)
    return where(config, SHAPE, rope_table(), Secret(bytearray(range(32))), b"test", DEVICE)


def waiting_side(kind: str, scheme: str, seal: int, path: str) -> SecureSide:
    """The same, where the host waits for every answer. kind: "local", "segments" or "worker", which listens at `path`
    and has the same root."""
    config = ScxConfig(tuple(range(LAYERS)), f"unix:{path}" if kind == "worker" else "cpu", scheme, seal_tokens=seal,
                       segment_tokens=SEAL if kind == "segments" else 0)  # fmt: skip
    model = b"test" * 8
    if kind == "worker":
        return RemoteSecureSide(config, SHAPE, rope_table(), model, DEVICE, dtype=torch.float32, step_tokens=32)
    make = SegmentedSide if kind == "segments" else LocalSecureSide
    return make(config, SHAPE, rope_table(), Secret(bytearray(ROOT)), model, DEVICE)


def rope_table() -> torch.Tensor:
    """(CAPACITY, 2, DIM / 2)."""
    return torch.rand(CAPACITY, 2, DIM // 2, generator=torch.Generator().manual_seed(5))


def decoder(scx: Scx | None, memory: torch.Tensor) -> Any:
    """Two layers with the same random weights, plain by PyTorch's kernels or encoded by the GPU's."""
    draw = torch.Generator().manual_seed(1)
    rope = rope_table().to(DEVICE)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * shape[-1] ** -0.5).to(DEVICE)

    kernels: Any = TorchKernels() if scx is None else CudaKernels()
    table, layers = noise(50, WIDTH) * 8, []
    for index in range(LAYERS):
        qkv, out = kernels.linear(noise((HEADS + 2 * GROUPS) * DIM, WIDTH)), kernels.linear(noise(WIDTH, HEADS * DIM))
        mlp = GatedMlp(kernels.gated_linear(noise(FFN, WIDTH), noise(FFN, WIDTH)), kernels.linear(noise(WIDTH, FFN)))
        norm = Norm(kernels, torch.ones(WIDTH, device=DEVICE), 1e-5)
        k, v = memory[0, :, :, index], memory[1, :, :, index]
        attention: Any = Attention(kernels, TorchVattn(SPEC), qkv, out, rope, k, v, HEADS, 0)
        if scx is not None:
            attention = ScxAttention(index, scx, scx.backend or TritonVattn(SPEC), qkv, out, k, v, 0)
        layers.append(kernels.fuse(PreNormLayer(norm, attention, norm, mlp)))
    assert scx is None or all(isinstance(layer, CudaLayer) for layer in layers)
    return SimpleNamespace(layers=layers, embed=lambda ids: table[ids.long()],
                           logits=lambda rows: rows.float())  # fmt: skip


def eager(model: Any, batch: Batch) -> torch.Tensor:
    """Layer after layer."""
    hidden = model.embed(batch.tokens)
    for layer in model.layers:
        layer(hidden, batch)
    return model.logits(hidden[batch.sample_rows.long()])  # type: ignore[no-any-return]


def pieces_of(model: Any, sessions: Sessions) -> PieceGraphs:
    """Recorded, or run again where nothing records."""
    def record_nothing(work: Replay) -> Replay:
        def replay() -> None:
            sessions.scx.secure.recording = True
            work()
            sessions.scx.secure.recording = False
        replay()
        return replay

    record = record_nothing if INTERPRETED else None
    pieces = PieceGraphs(model, DEVICE, 32, heads=HEADS, head_dim=DIM, record=record)
    with sessions.recording():
        pieces.capture()
    return pieces


@pytest.mark.parametrize("where", SIDES)
@pytest.mark.parametrize("seal", [0, SEAL])
@pytest.mark.parametrize("scheme", ["perm-static", "perm", "rotate", "mix"])
def test_encoded_layers_equal_plain_ones(scheme: str, seal: int, where: type[InStreamSide]) -> None:
    """Seven steps of prompts and decodes; each way to run a step gives the plain output, and no row in plaintext."""
    shape = (2, SLOTS, CAPACITY, LAYERS, GROUPS, DIM)
    plain_memory = torch.zeros(shape, device=DEVICE)
    plain = decoder(None, plain_memory)
    side = secure_side(scheme, seal, where)
    scx = Scx(side.config, side)
    sessions = Sessions(scx)
    memory = torch.zeros(shape, device=DEVICE)
    model = decoder(scx, memory)
    pieces = pieces_of(model, sessions)
    with torch.inference_mode():
        for slot in range(3):
            side.open(slot, bytes([slot]) * 16)
        for number, chunks in enumerate(STEPS):
            host = pack([Row(slot, start, [7 * slot + i for i in range(count)], True) for slot, start, count in chunks])
            batch = host.to(DEVICE)
            want = eager(plain, batch)
            assert pieces.fits(batch)
            if number % 4 == 0:
                sessions.claim(batch)
                got = pieces(batch)
            elif not batch.spans:  # what a graph of the whole step does
                sessions.claim(batch)
                with sessions.recording():
                    got = eager(model, batch)
                sessions.seal(batch)
            else:
                got = eager(model, batch)
            assert relative(got, want) < 1e-5, (number, chunks)
    lengths = {0: 9, 1: 17, 2: 17}
    for slot, length in lengths.items():
        encoded, rows = memory[:, slot, :length].flatten(0, 2), plain_memory[:, slot, :length].flatten(0, 2)
        assert not bool((encoded[:, None] == rows[None]).all(-1).all(-1).any())
        if scheme.startswith("perm"):  # sorted, rows are the plain ones in some order: nothing is lost or doubled
            both = (x.sort(dim=-1).values.sum(0) for x in (encoded, rows))
            assert relative(*both) < 1e-5
    assert not bool(memory[:, 3].any())
    row = 2 * (HEADS + GROUPS) * DIM * 4
    tokens = sum(count for chunks in STEPS for _, _, count in chunks)
    assert (side.traffic.bytes_in, side.traffic.bytes_out) == (tokens * LAYERS * row,) * 2
    assert side.traffic.calls == 2 * LAYERS * len(STEPS)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("scheme", "seal"), [("perm", 0), ("mix", SEAL)])
@pytest.mark.parametrize("kind", ["local", "segments", "worker"])
def test_pieces_leave_out_a_side_that_is_waited_for(
    kind: str, scheme: str, seal: int, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step in pieces gives the plain output, and does to the slabs and the secure side what it does as it comes:
    rows of padding are neither sent nor stored. cut: projections come as sums of parts."""
    if cut:
        monkeypatch.setattr(triton_gemm, "measured_config", lambda x, rows, gated: triton_gemm.GemmConfig(
            m=16, n=16 if INTERPRETED else 64, k=32, parts=1 if gated else 2))  # fmt: skip
    shape = (2, SLOTS, CAPACITY, LAYERS, GROUPS, DIM)
    plain = decoder(None, torch.zeros(shape, device=DEVICE))
    batches = [pack([Row(slot, start, [7 * slot + i for i in range(count)], True) for slot, start, count in chunks])
               for chunks in STEPS]  # fmt: skip
    found = []
    with torch.inference_mode():
        wanted = [eager(plain, host.to(DEVICE)) for host in batches]
        for split in (False, True):
            with worker_thread(tmp_path, same_nonces=True) as (path, _):
                side = waiting_side(kind, scheme, seal, path)
                backend = SegmentBackend(SEAL, DIM**-0.5) if kind == "segments" else None
                memory, scx = torch.zeros(shape, device=DEVICE), Scx(side.config, side, backend=backend)
                model, sessions = decoder(scx, memory), Sessions(scx)
                pieces = pieces_of(model, sessions) if split else None
                for slot in range(3):
                    side.open(slot, bytes([slot]) * 16)
                for number, host in enumerate(batches):
                    batch = host.to(DEVICE)
                    sessions.claim(batch)
                    got = eager(model, batch) if pieces is None else pieces(batch)
                    assert relative(got, wanted[number]) < 1e-5, (split, number)
                found.append((memory, side.traffic))
                side.shut()
    (as_it_comes, before), (in_pieces, after) = found
    assert after == before and after.calls == 2 * LAYERS * len(STEPS)
    assert relative(in_pieces, as_it_comes) < 1e-5
    assert bool((in_pieces == 0).eq(as_it_comes == 0).all()) and not bool(in_pieces[:, 3].any())


@pytest.mark.parametrize("size", [3, 16, 300])
def test_blocks_are_shuffled_in_place(size: int) -> None:
    """As PyTorch does it."""
    for name, wrong, bound in check_shuffle(Bench(str(DEVICE), torch.float32), size):
        assert wrong <= bound, name


def test_a_replayed_step_is_claimed_once() -> None:
    """The same step twice, one that skips a position, one whose session is gone: nothing of it may be replayed."""
    side = secure_side("perm")
    side.open(1, b"n" * 16)
    first = pack([Row(1, 0, [1, 2, 3], True)])
    side.claim(first)
    for again in (first, pack([Row(1, 2, [1], True)]), pack([Row(1, 4, [1], True)])):
        with pytest.raises(OutOfOrder, match="but 3 is next"):
            side.claim(again)
    side.claim(pack([Row(1, 3, [1], True)]))
    assert (side._next[:, 1] == 4).all()  # a refused step counts in no layer


@pytest.mark.parametrize("where", SIDES)
def test_maps_travel_once_and_leave_nothing(where: type[InStreamSide]) -> None:
    """Opening fills a slot's row and no other; closing clears it, and host memory is clear once it has arrived."""
    side = secure_side("mix", where=where)
    side.open(2, b"a" * 16)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert bool(side._whole[2].any()) and not bool(side._whole[[0, 1, 3]].any())
    want = maps_of(side.scheme, side._sessions[2].keys, side.config.layers, GROUPS, DIM)
    for place, tables in enumerate(side._tables):
        assert all(relative(table[2], made[place]) < 1e-6 for table, made in zip(tables, want, strict=True))
    side.close(2)
    side.shut()
    assert not bool(side._whole.any())
    assert not side._staging._sent and not any(bool(kept.any()) for kept in side._staging._free)


@pytest.mark.parametrize("where", SIDES)
def test_a_thread_that_never_called_the_device_opens_a_slot(where: type[InStreamSide]) -> None:
    """As LLM.generate in a thread of its own does: the driver wants to be told which context is meant."""
    side = secure_side("perm", where=where)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(side.open, 1, b"a" * 16).result()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert bool(side._whole[1].any()) and not bool(side._whole[0].any())


def test_staging_waits_only_when_it_is_full() -> None:
    """More sends than buffers: every one arrives."""
    staging = Staging((4, 5), torch.float32, DEVICE)
    staging._count = 2
    into = torch.zeros(9, 4, 5, device=DEVICE)
    for i in range(9):
        staging.send(lambda staged, i=i: staged.fill_(i + 1), into[i].copy_)  # type: ignore[misc]
    assert into[:, 0, 0].tolist() == list(range(1, 10))
    staging.drain()
    assert len(staging._free) <= 2 and not any(bool(kept.any()) for kept in staging._free)


def test_the_same_rows_whatever_the_way() -> None:
    """Replayed and run as it comes, a layer stores the same bits."""
    found = []
    for whole in (False, True):
        side = secure_side("perm")
        scx = Scx(side.config, side)
        memory = torch.zeros(2, SLOTS, CAPACITY, LAYERS, GROUPS, DIM, device=DEVICE)
        model, sessions = decoder(scx, memory), Sessions(scx)
        side.open(0, b"k" * 16)
        host = pack([Row(0, 0, [1, 2, 3, 4, 5], True)])
        batch = dataclasses.replace(host.to(DEVICE), host=host)
        with torch.inference_mode():
            if whole:
                sessions.claim(batch)
                pieces_of(model, sessions)(batch)
            else:
                eager(model, batch)
        found.append(memory)
    assert relative(found[1], found[0]) < 1e-6
