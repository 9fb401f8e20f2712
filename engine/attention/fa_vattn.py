"""Attention over slabs on a Hopper GPU: FlashAttention 3 for long chunks of prompts, our kernels for the rest.

FlashAttention's bulk loads stop at the bounds of the tensor they are given, not at a sequence's length, so each prompt
is given as a view of exactly its length (K[slot, :kv_len]); a whole slab with lengths beside it would be read past
what is mapped. That is a launch a prompt, and the host needs about 35 us for it; so short chunks that come together go
into one launch of our kernel, as do windows, which fa3-fwd's builds leave out. Lengths come from Batch.spans, on the
host: a graph with a prompt in it fits that prompt only.

Prompts multiply and decodes read memory, so the two could share the device: FlashAttention leaves some multiprocessors
free, and the decodes run on those at the same time, in a stream of their own (`beside`; off until it is measured).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from engine.attention.base import Caps, backends
from engine.attention.triton_vattn import DecodeHalf, cuda_missing
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch, Span

WORTH_PAIRS = 1 << 19  # (query, key) pairs a prompt, on average, above which several prompts get a launch each
TILE_ROWS = 128  # query rows (token, head) of one of FlashAttention's tiles
FEW_TILES = 100  # below which a chunk is also cut along its keys, to use all multiprocessors
PAIR_NS, KEY_NS = 8e-4, 0.12  # of an H200 with heads of 128: a (query, key) pair of a head; a key of a KV head
LEAST_US = 15.0  # of either half, for which it pays to run both at once


def worth_it(spans: Sequence[Span]) -> bool:
    """Whether these prompts are better launched one by one than all in one launch of the slower kernel."""
    pairs = sum((last - first) * kv_len for _, first, last, kv_len in spans)
    return len(spans) == 1 or pairs >= WORTH_PAIRS * len(spans)


def shared_sms(spans: Sequence[Span], kv_lens: torch.Tensor, spec: ModelSpec, sms: int) -> int:
    """Multiprocessors to leave to the decodes while the prompts run; 0: one after the other.

    kv_lens: of the decodes, in host memory. Half of the device reads nearly as fast as all of it, and multiplies half
    as fast, so the prompts must be short beside the decodes.
    """
    pairs = sum((last - first) * (kv_len - (last - first) / 2) for _, first, last, kv_len in spans)
    width = spec.head_dim / 128
    prompts_us = pairs * spec.heads * width * PAIR_NS / 1e3
    decodes_us = float(kv_lens.sum()) * spec.kv_heads * width * KEY_NS / 1e3
    if min(prompts_us, decodes_us) < LEAST_US:
        return 0
    return sms // 2 if decodes_us >= 0.8 * prompts_us else sms // 4 if decodes_us >= 0.3 * prompts_us else 0


@backends.register("fa_vattn")
class FaVattn:
    """FlashAttention 3 launches or one of ours for prompts, one launch for all decodes."""

    caps = Caps(device="cuda", dtypes=("bfloat16",), head_dims=(64, 96, 128, 192, 256), rank=10)

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no Hopper GPU or no FlashAttention 3."""
        absent = cuda_missing()
        if absent:
            return absent
        major, minor = torch.cuda.get_device_capability()
        if major != 9:
            return f"FlashAttention 3 wants compute capability 9.x, not {major}.{minor}"
        if importlib.util.find_spec("fa3_fwd_interface") is None:
            return "FlashAttention 3 is not installed; pip install fa3-fwd"
        return None

    def __init__(self, spec: ModelSpec) -> None:
        import fa3_fwd_interface  # noqa: F401  registers the operator

        from tessera_kernels.triton_attention_prefill import attention_prefill

        # the operator itself: its Python wrapper costs the host twice what the launch does
        self._flash = torch.ops.fa3_fwd.fwd
        self._prefill, self.decode_half = attention_prefill, DecodeHalf(spec)
        self.scale, self._spec = spec.head_dim**-0.5, spec
        self._sms = torch.cuda.get_device_properties(0).multi_processor_count
        # multiprocessors for decodes that run beside prompts; 0: after them; None: by the batch. 0 until it is measured
        self.beside: int | None = 0
        self._side, self._begin, self._end = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
        self._step: Batch | None = None  # the step that _shared is of
        self._shared = 0

    def _prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, left_sms: int) -> None:
        """q (n, H, D), k and v (kv_len, G, D), causal to the end of k -> out (n, H, D)."""
        few = q.shape[0] * q.shape[1] < FEW_TILES * TILE_ROWS
        self._flash(q[None], k[None], v[None], out=out[None], softmax_scale=self.scale, is_causal=True,
                    num_splits=0 if few else 1, sm_margin=left_sms)  # fmt: skip

    def _share(self, batch: Batch) -> int:
        """Multiprocessors for the decodes of this step beside its prompts; asked once a step."""
        if self._step is not batch:
            self._step, self._shared = batch, 0
            prompts = len(batch.spans)
            if batch.host is not None and prompts < batch.slots.shape[0]:
                self._shared = self.beside if self.beside is not None else shared_sms(
                    batch.spans, batch.host.kv_lens[prompts:], self._spec, self._sms)  # fmt: skip
        return self._shared

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        spans = batch.spans
        flat = torch.empty_like(q).flatten(1) if out is None else out
        heads = flat.view_as(q)
        if spans and not window and worth_it(spans):
            sms = self._share(batch)
            if sms:
                self._begin.record()
            for slot, first, last, kv_len in spans:
                self._prompt(q[first:last], k[slot, :kv_len], v[slot, :kv_len], heads[first:last], sms)
            if sms:  # behind the prompts, which have taken their multiprocessors by then
                self._side.wait_event(self._begin)
                with torch.cuda.stream(self._side):
                    self.decode_half(q, k, v, batch, window, flat, sms=sms)
                self._end.record(self._side)
                torch.cuda.current_stream().wait_event(self._end)
                return flat
        elif spans:
            tokens, prompts = batch.num_prefill_tokens, len(spans)
            self._prefill(q[:tokens], k, v, batch.slots[:prompts], batch.q_starts[: prompts + 1],
                          batch.kv_lens[:prompts], self.scale, window, out=flat[:tokens])  # fmt: skip
        self.decode_half(q, k, v, batch, window, flat)
        return flat
