"""Attention over slabs by FlashInfer's paged kernels: a whole slot is one page, so its table has one entry a sequence.

FlashInfer takes any strides of a page, of tokens and of heads. Its FA2 templates load a key or value only where its
index is below the sequence's length (read in include/flashinfer/attention/prefill.cuh of 0.6.14: predicated 16-byte
copies), so nothing past it need be mapped; its FA3 templates copy whole tiles and are not used. Each step is planned on
the host, from lengths, so a decode graph cannot replay it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.attention.base import Caps, backends, placed
from engine.attention.triton_vattn import cuda_missing
from engine.core.errors import ConfigError, InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
_MOST_STRIDE = (1 << 32) - 1  # elements: its kernels keep strides as unsigned 32-bit numbers


class Pages(NamedTuple):
    """FlashInfer's table of a batch: indptr (B + 1,), indices (indptr[-1],), last_len (B,), each int32 on the host."""

    indptr: np.ndarray
    indices: np.ndarray
    last_len: np.ndarray


def slots_as_pages(batch: Batch) -> Pages:
    """Each sequence is one page: its slot, filled to its length. batch: on the host."""
    slots: np.ndarray = batch.slots.numpy()
    return Pages(np.arange(len(slots) + 1, dtype=np.int32), slots, batch.kv_lens.numpy())


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
        self._step: Batch | None = None
        self._halves: tuple[Batch, Batch] | None = None
        self._planned: set[tuple[str, int]] = set()

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int
    ) -> torch.Tensor:
        """As AttentionBackend.attend; k, v: (pages, tokens of a page, G, D)."""
        if k.stride(0) > _MOST_STRIDE:
            raise ConfigError(
                f"a slot of {k.stride(0)} elements is beyond FlashInfer's 32-bit strides; "
                "use a smaller --max-model-len or --attention-backend triton_vattn"
            )
        if self._step is not batch or self._halves is None:
            self._step, self._planned = batch, set()
            self._halves = batch.split()
        out = torch.empty_like(q)
        first = batch.num_prefill_tokens
        for phase, part, rows in zip(("prefill", "decode"), self._halves, (slice(0, first), slice(first, None)),
                                     strict=True):  # fmt: skip
            if part.slots.shape[0]:
                self._wrapper(phase, part, q, k, window).run(q[rows], (k, v), out=out[rows])
        return out.flatten(1)

    def _wrapper(self, phase: str, batch: Batch, q: torch.Tensor, k: torch.Tensor, window: int) -> Any:
        """The wrapper of a phase and window, planned for this step."""
        key = (phase, window)
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        if key not in self._wrappers:
            kind = "BatchPrefillWithPagedKVCacheWrapper" if phase == "prefill" else "BatchDecodeWithPagedKVCacheWrapper"
            more = {} if phase == "prefill" else {"use_tensor_cores": True}
            made = getattr(self._flashinfer, kind)(self._workspace, "NHD", backend="fa2", **more)
            self._wrappers[key] = made
        wrapper = self._wrappers[key]
        if key in self._planned:
            return wrapper
        host = batch if batch.slots.device.type == "cpu" else batch.host
        if host is None:
            raise InvariantError("FlashInfer plans from host numbers, and this batch has none")
        pages = self._pages_of(host)
        spec = self._spec
        table = (torch.from_numpy(pages.indptr), torch.from_numpy(pages.indices).to(q.device, non_blocking=True),
                 torch.from_numpy(pages.last_len))  # fmt: skip
        shape = (spec.heads, spec.kv_heads, spec.head_dim, k.shape[1])
        common = {"sm_scale": self._scale, "window_left": window - 1 if window else -1,
                  "q_data_type": q.dtype, "kv_data_type": k.dtype}  # fmt: skip
        if phase == "prefill":
            wrapper.plan(host.q_starts, *table, *shape, causal=True, **common)
        else:
            wrapper.plan(*table, *shape, **common)
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
        self._runs = FlashInferRuns(spec, slots_as_pages)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        return placed(self._runs.attend(q, k, v, batch, window), out)
