"""Attention over slabs by FlashInfer's paged kernels: a slot is cut into pages where it lies, its table is arithmetic.

FlashInfer takes any strides of a page, of tokens and of heads, pages that overlap too. It splits a sequence between
blocks of the GPU only where a page begins, so a slot that were one page would never be split. Its FA2 templates load a
key or value only where its index is below the sequence's length (read in include/flashinfer/attention/prefill.cuh of
0.6.14: predicated 16-byte copies), so nothing past it need be mapped; its FA3 templates copy whole tiles and are not
used. Each step is planned on the host, from lengths, so a decode graph cannot replay it.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.attention.base import Caps, backends, placed
from engine.attention.triton_vattn import cuda_missing
from engine.core.errors import ConfigError, InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch, Paged

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
_MOST_ROWS = 128  # queries times heads of a group that a block of its kernels takes
_PAGE_TOKENS = 128  # its shortest part of a sequence
_MOST_PAGES = (1 << 31) - 1


class Pages(NamedTuple):
    """FlashInfer's table of a batch: indptr (B + 1,), indices (indptr[-1],), last_len (B,), each int32 on the host."""

    indptr: np.ndarray
    indices: np.ndarray
    last_len: np.ndarray


def filled(lengths: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pages of `tokens` tokens that each sequence fills, Pages.indptr, Pages.last_len)."""
    counts: np.ndarray = -(-lengths // tokens)
    indptr: np.ndarray = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return counts, indptr, (lengths - (counts - 1) * tokens).astype(np.int32)


class Cut(NamedTuple):
    """Slots as pages of `tokens` tokens, one every `unit` elements: page m of slot s is number s * slot + m * page."""

    tokens: int
    unit: int
    slot: int
    page: int

    @classmethod
    def of(cls, slots: torch.Tensor) -> Cut:
        """slots: (S, C, G, D). FlashInfer keeps a page's stride in 32 bits, which a unit fits and a slot may not.

        Raises ConfigError when pages have numbers beyond 31 bits, as its table has."""
        tokens = min(_PAGE_TOKENS, slots.shape[1])
        slot, page = slots.stride(0), tokens * slots.stride(1)
        unit = math.gcd(slot, page)
        if slots.shape[0] * (slot // unit) > _MOST_PAGES:
            raise ConfigError(
                f"{slots.shape[0]} slots of {slot} elements, cut every {unit}: more than FlashInfer's {_MOST_PAGES} "
                "pages; use a smaller --max-num-seqs or --max-model-len, or --attention-backend triton_vattn"
            )
        return cls(tokens, unit, slot // unit, page // unit)

    def pages(self, slots: torch.Tensor) -> torch.Tensor:
        """The view; a last page that its slot holds in part may lie beyond it."""
        count, room, *rest = slots.shape
        last = (count - 1) * slots.stride(0) + (room - self.tokens) * slots.stride(1)
        return slots.as_strided((last // self.unit + 1, self.tokens, *rest), (self.unit, *slots.stride()[1:]))


def flashinfer_missing() -> str | None:
    """Why FlashInfer cannot run here, or None."""
    absent = cuda_missing()
    if absent:
        return absent
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed; pip install flashinfer-python==0.6.14"
    lacking = [tool for tool in ("ninja", "nvcc") if shutil.which(tool) is None]
    if lacking:
        return f"FlashInfer compiles its kernels at first use and finds no {' and no '.join(lacking)}"
    return None


class FlashInferRuns:
    """Plans a step once for each window and runs it for every layer. pages_of: a batch's table; see Pages."""

    def __init__(self, spec: ModelSpec, pages_of: Callable[[Batch], Pages]) -> None:
        import flashinfer

        self._flashinfer: Any = flashinfer
        self._spec, self._pages_of, self._scale = spec, pages_of, spec.head_dim**-0.5
        self._workspace: torch.Tensor | None = None
        self._wrappers: dict[tuple[str, int], Any] = {}  # (phase, window): each keeps its own plan
        self._copied: dict[tuple[str, int], torch.cuda.Event] = {}  # its plan has left the host
        self._step: tuple[Batch | None, Paged | None] = None, None
        self._halves: tuple[Batch, Batch] | None = None  # on the host
        self._planned: set[tuple[str, int]] = set()

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int
    ) -> torch.Tensor:
        """As AttentionBackend.attend; k, v: (pages, tokens of a page, G, D)."""
        host = batch if batch.slots.device.type == "cpu" else batch.host
        if host is None:
            raise InvariantError("FlashInfer plans from host numbers, and this batch has none")
        if self._halves is None or self._step[0] is not host or self._step[1] is not batch.paged:
            self._step, self._planned = (host, batch.paged), set()
            self._halves = host.split()
        out = torch.empty_like(q)
        first = batch.num_prefill_tokens
        for phase, part, rows in zip(("prefill", "decode"), self._halves, (slice(0, first), slice(first, None)),
                                     strict=True):  # fmt: skip
            if part.slots.shape[0]:
                self._wrapper(phase, part, q, k, window).run(q[rows], (k, v), out=out[rows])
        return out.flatten(1)

    def _room(self, device: torch.device) -> int:
        """Bytes for the parts of sequences that are split: it launches two blocks a multiprocessor for them at most."""
        if device.type == "cpu":
            return _WORKSPACE_BYTES
        spec = self._spec
        blocks = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        rows = blocks * _MOST_ROWS * (spec.heads // spec.kv_heads)
        return max(_WORKSPACE_BYTES, rows * (spec.head_dim + 1) * 4 + 256)  # float32, each part aligned

    def _wrapper(self, phase: str, host: Batch, q: torch.Tensor, k: torch.Tensor, window: int) -> Any:
        """The wrapper of a phase and window, planned for this step."""
        key = (phase, window)
        if self._workspace is None:
            self._workspace = torch.zeros(self._room(q.device), dtype=torch.uint8, device=q.device)
        if key not in self._wrappers:
            kind = "BatchPrefillWithPagedKVCacheWrapper" if phase == "prefill" else "BatchDecodeWithPagedKVCacheWrapper"
            more = {} if phase == "prefill" else {"use_tensor_cores": True}
            made = getattr(self._flashinfer, kind)(self._workspace, "NHD", backend="fa2", **more)
            self._wrappers[key] = made
        wrapper = self._wrappers[key]
        if key in self._planned:
            return wrapper
        pages = self._pages_of(host)
        spec = self._spec
        table = (torch.from_numpy(pages.indptr), torch.from_numpy(pages.indices).to(q.device, non_blocking=True),
                 torch.from_numpy(pages.last_len))  # fmt: skip
        shape = (spec.heads, spec.kv_heads, spec.head_dim, k.shape[1])
        common = {"sm_scale": self._scale, "window_left": window - 1 if window else -1,
                  "q_data_type": q.dtype, "kv_data_type": k.dtype}  # fmt: skip
        if q.is_cuda:  # a plan is copied from one pinned buffer, which the next, a step ahead, would overwrite
            self._copied.setdefault(key, torch.cuda.Event()).synchronize()
        if phase == "prefill":
            wrapper.plan(host.q_starts, *table, *shape, causal=True, **common)
        else:
            wrapper.plan(*table, *shape, **common)
        if q.is_cuda:
            self._copied[key].record()
        self._planned.add(key)
        return wrapper


@backends.register("fi_vattn")
class FiVattn:
    """Two launches a layer at most, after a plan a step."""

    caps = Caps(device="cuda", dtypes=("bfloat16", "float16"), head_dims=(64, 128, 256), graphs=False, rank=30)

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no CUDA device, no FlashInfer or no compiler for it."""
        return flashinfer_missing()

    def __init__(self, spec: ModelSpec) -> None:
        self._runs = FlashInferRuns(spec, self._pages_of)
        self._cut: Cut | None = None  # of the step under way

    def _pages_of(self, batch: Batch) -> Pages:
        """The pages of each sequence's slot, up to its length. batch: on the host."""
        assert self._cut is not None
        counts, indptr, last_len = filled(batch.kv_lens.numpy(), self._cut.tokens)
        first = batch.slots.numpy() * self._cut.slot - indptr[:-1] * self._cut.page
        indices = np.repeat(first, counts) + np.arange(indptr[-1], dtype=np.int32) * self._cut.page
        return Pages(indptr, indices.astype(np.int32), last_len)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        self._cut = cut = Cut.of(k)
        return placed(self._runs.attend(q, cut.pages(k), cut.pages(v), batch, window), out)
