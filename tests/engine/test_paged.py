"""The paged twin answers as slots do, under the same ledger; and how backends are chosen and put together by phase."""

from __future__ import annotations

import dataclasses
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.attention import fi_vattn
from engine.attention.choose import Choice, choose_backend, make_backend
from engine.attention.fi_paged import FiPaged
from engine.attention.fi_vattn import FiVattn
from engine.attention.torch_paged import TorchPaged
from engine.attention.torch_vattn import TorchVattn
from engine.core.errors import ConfigError
from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.request import SamplingParams
from engine.kv.paged import PagedStore
from engine.runner.batch import Batch, Row, pack
from tests import models
from tests.engine import oracle
from vattention_ext import KvGeometry

CPU = torch.device("cpu")
SPEC: Any = SimpleNamespace(heads=4, kv_heads=2, head_dim=16)


def paged_store(groups: int = 40, *, layout: str = "mega", clear: bool = False, slots: int = 6) -> PagedStore:
    """Blocks of 16 tokens (mega) or 32."""
    geometry = KvGeometry(layers=2, kv_heads=2, head_dim=16, element_bytes=4, max_tokens=256, slots=slots,
                          page_bytes=4096, layout=layout)  # fmt: skip
    return PagedStore(geometry, groups, torch.float32, CPU, clear=clear)


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_paged_and_slots_give_the_same_tokens(tmp_path: Any, layout: str) -> None:
    """Greedy answers in a crowd, in a pool so small that some are preempted, through the whole engine."""
    folder = models.tiny_llama_dir(tmp_path, 3)
    many = oracle.prompts(6, 512, 5, 1, 60)
    answers = {}
    for name in ("torch_vattn", "torch_paged"):
        engine = oracle.make_engine(folder, kernels="torch", attention_backend=name, kv_page_bytes=4096, max_num_seqs=6,
                                    kv_pool_bytes=16 * 8192, chunk_tokens=48, max_model_len=128,
                                    kv_layout=layout)  # fmt: skip
        answers[name] = oracle.run_greedy(engine, many, 16)
        assert engine.stats()["preempted_total"] > 0
        assert engine.stats()["kv_groups_in_use"] == 0
        engine.close()
    assert answers["torch_paged"] == answers["torch_vattn"]


def test_no_block_belongs_to_two() -> None:
    """Random admissions, growth and ends against the ledger's arithmetic: no block has two owners, none is lost."""
    rng, store, lengths = random.Random(4), paged_store(), {}
    refusals = 0
    for step in range(400):
        releases = tuple(seq for seq in lengths if rng.random() < 0.08)
        for seq in releases:
            del lengths[seq]
        admissions, chunks = [], []
        if len(lengths) < 6 and rng.random() < 0.5:
            lengths[step] = 0
            admissions.append(Admission(step, 0, tuple(range(rng.randrange(1, 200))), 0, SamplingParams()))
        for seq, known in list(lengths.items()):
            end = min(256, known + rng.choice([1, 1, 1, 17, 60]))
            if end > known:
                chunks.append(Chunk(seq, 0, known, end - known, True))
                lengths[seq] = end
        refused = store.apply(StepPlan(step, tuple(chunks), tuple(admissions), releases))
        refusals += len(refused)
        for seq in refused:
            del lengths[seq]
        held = [block for blocks in store._held.values() for block in blocks]
        assert len(set(held)) == len(held)
        assert len(held) == sum(store.geometry.groups_for(n) for n in lengths.values())
        assert store.stats()["kv_groups_total"] == 40
        for seq, tokens in lengths.items():
            slot = store.slot_of(seq)
            count = store.geometry.groups_for(tokens)
            assert store.table[slot, :count].tolist() == store._held[slot]
    assert refusals > 10


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
@pytest.mark.parametrize("clear", [True, False])
def test_a_cleared_block_reads_zeros(layout: str, clear: bool) -> None:
    """With clear, nothing of an ended request is left in the pool."""
    store = paged_store(layout=layout, clear=clear)
    slot = store.borrow(100)
    for layer in range(2):
        for view in store.layer_views(layer):
            view[store._held[slot]] = 7.0
    store.give_back(slot)
    left = sum(float(view.abs().sum()) for layer in range(2) for view in store.layer_views(layer))
    assert (left == 0.0) is clear


def test_what_a_paged_store_refuses() -> None:
    """A page that holds no whole tokens, with the page that does; a prompt beyond the pool."""
    geometry = KvGeometry(layers=3, kv_heads=3, head_dim=64, element_bytes=2, max_tokens=64, slots=2, page_bytes=4096)
    with pytest.raises(ConfigError, match="use 36864"):  # lcm of 4,096 and 1,152
        PagedStore(geometry, 4, torch.bfloat16, CPU)
    store = paged_store(groups=3)
    with pytest.raises(ConfigError, match="cannot hold one step of 200 tokens"):
        store.borrow(200)
    assert store.stats()["kv_groups_in_use"] == 0


def hybrid(store: PagedStore, chunks: list[tuple[int, int]]) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A placed batch of (start, tokens) chunks, queries, and the keys and values of its blocks as slots."""
    slots = [store.borrow(start + count) for start, count in chunks]
    slab = torch.full((2, 6, 256, 2, 16), float("nan"))
    for slot, (start, count) in zip(slots, chunks, strict=True):
        slab[:, slot, : start + count] = torch.randn(2, start + count, 2, 16)
        for side, view in enumerate(store.layer_views(0)):
            for token in range(start + count):
                view[store.host_table[slot, token // 16], token % 16] = slab[side, slot, token]
    rows = [Row(slot, start, [0] * count, True) for slot, (start, count) in zip(slots, chunks, strict=True)]
    batch = store.place(pack(rows))
    return batch, torch.randn(batch.num_tokens, 4, 16), slab[0], slab[1]


MIXES = [[(0, 40), (50, 1), (31, 20), (99, 1), (0, 1)], [(16, 17)], [(15, 1), (16, 1)]]


@pytest.mark.parametrize("chunks", MIXES)
@pytest.mark.parametrize("window", [0, 9])
def test_backends_by_phase_and_by_blocks(chunks: list[tuple[int, int]], window: int) -> None:
    """A hybrid batch split between two backends, and one over blocks, give what the plain backend gives."""
    store = paged_store()
    batch, q, k, v = hybrid(store, chunks)
    want = TorchVattn(SPEC).attend(q, k, v, batch, window)
    both = make_backend(Choice("torch_vattn", "cpu_vattn", {}), SPEC)
    torch.testing.assert_close(both.attend(q, k, v, batch, window), want)
    torch.testing.assert_close(TorchPaged(SPEC).attend(q, *store.layer_views(0), batch, window), want)


class FakeWrapper:
    """FlashInfer's paged wrappers as documented: page i of sequence b is indices[indptr[b] + i], the last of which
    holds last_page_len tokens; queries stand at the end."""

    plans = 0

    def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str, use_tensor_cores: bool = False) -> None:
        assert layout == "NHD" and backend == "fa2" and workspace.dtype is torch.uint8
        self.decodes = use_tensor_cores

    def plan(self, *tables: Any, causal: bool = False, **options: Any) -> None:
        """Remember the tables."""
        starts = None if self.decodes else tables[0]
        self.indptr, self.indices, self.last, *shape = tables if self.decodes else tables[1:]
        assert shape[:3] == [4, 2, 16] and causal is not self.decodes
        count = len(self.last)
        self.starts = torch.arange(count + 1, dtype=torch.int32) if starts is None else starts
        self.page, self.window = shape[3], options["window_left"] + 1
        FakeWrapper.plans += 1

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """Attend by the plain backend."""
        counts = self.indptr[1:] - self.indptr[:-1]
        lens = ((counts - 1) * self.page + self.last).to(torch.int32)
        flat = []
        for view in pages:
            joined = torch.full((len(lens), int(lens.max()), 2, 16), float("nan"))
            for b, length in enumerate(lens.tolist()):
                own = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
                joined[b, :length] = view[own].flatten(0, 1)[:length]
            flat.append(joined)
        rows = torch.arange(len(lens), dtype=torch.int32)
        batch = Batch(rows, rows, rows, rows, self.starts, lens, rows)
        out.copy_(TorchVattn(SPEC).attend(q, flat[0], flat[1], batch, self.window).view_as(out))


@pytest.mark.parametrize("page_tokens", [7, 32])
@pytest.mark.parametrize("chunks", MIXES)
def test_flashinfer_is_told_the_right_tables(
    monkeypatch: pytest.MonkeyPatch, chunks: list[tuple[int, int]], page_tokens: int
) -> None:
    """A slot cut into pages where it lies, and blocks as they lie, planned once a step and window, not once a layer."""
    wrappers = dict.fromkeys(("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"), FakeWrapper)
    monkeypatch.setattr(fi_vattn, "_WORKSPACE_BYTES", 64)
    monkeypatch.setattr(fi_vattn, "_PAGE_TOKENS", page_tokens)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrappers))
    store = paged_store()
    batch, q, k, v = hybrid(store, chunks)
    for backend, views in ((FiVattn(SPEC), (k, v)), (FiPaged(SPEC), store.layer_views(0))):
        FakeWrapper.plans = 0
        for _ in range(3):
            for window in (0, 9):
                want = TorchVattn(SPEC).attend(q, k, v, batch, window)
                torch.testing.assert_close(backend.attend(q, *views, batch, window), want)
        phases = bool(batch.spans) + (batch.slots.shape[0] > len(batch.spans))
        assert FakeWrapper.plans == 2 * phases


def test_pages_of_slots_have_numbers_that_a_table_holds() -> None:
    """Page m of slot s begins where the slot's token T m lies; slots whose strides share little are refused."""
    tokens = fi_vattn._PAGE_TOKENS
    for count, stride, unit in ((4, 512 * 64, tokens * 64), (4, 512 * 64 + 32, 32)):
        slots = torch.empty((count - 1) * stride + 512 * 64).as_strided((count, 512, 2, 16), (stride, 64, 16, 1))
        cut = fi_vattn.Cut.of(slots)
        assert (cut.unit, cut.slot * cut.unit, cut.page * cut.unit) == (unit, stride, tokens * 64)
        view = cut.pages(slots)
        for slot, m in ((0, 0), (1, 3), (count - 1, 2)):
            assert view[slot * cut.slot + m * cut.page].data_ptr() == slots[slot, tokens * m].data_ptr()
    far = torch.empty(1, device="meta").as_strided((1 << 20, 512, 2, 16), ((1 << 20) + 1, 64, 16, 1))
    with pytest.raises(ConfigError, match="pages; use a smaller --max-num-seqs"):
        fi_vattn.Cut.of(far)


def test_auto_takes_what_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase by its times; one backend for both where it is as fast within 2 %; by rank where nothing was measured;
    never one with block tables, nor for decodes one that no graph can replay; and every loser has its reason."""
    asked = ("auto", "cpu", "float32", 64)
    assert choose_backend(*asked)[:2] == ("cpu_vattn", "cpu_vattn")
    times = {"prefill": {"torch_vattn": 50.0, "cpu_vattn": 90.0, "torch_paged": 1.0}, "decode": {"cpu_vattn": 10.0}}
    assert choose_backend(*asked, times)[:2] == ("torch_vattn", "cpu_vattn")
    times["decode"]["torch_vattn"] = 10.1
    assert choose_backend(*asked, times)[:2] == ("torch_vattn", "cpu_vattn")
    monkeypatch.setattr(TorchVattn, "caps", dataclasses.replace(TorchVattn.caps, graphs=True))
    prefill, decode, lost = choose_backend(*asked, times)
    assert (prefill, decode) == ("torch_vattn", "torch_vattn")
    assert lost["cpu_vattn"] == ["prefill 90 us, torch_vattn 50 us, decode 10 us, torch_vattn 10 us"]
    assert "block tables" in lost["torch_paged"][0] and "runs on cuda" in lost["triton_vattn"][0]
