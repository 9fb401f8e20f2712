"""Attention over slabs on a Hopper GPU: FlashAttention 3 for long chunks of prompts, our kernels for the rest.

FlashAttention's bulk loads stop at the bounds of the tensor they are given, not at a sequence's length, so each prompt
is given as a view of exactly its length (K[slot, :kv_len]); a whole slab with lengths beside it would be read past
what is mapped. That is a launch a prompt, and the host needs about 35 us for it; so short chunks that come together go
into one launch of our kernel, as do windows, which fa3-fwd's builds leave out. Lengths come from Batch.spans, on the
host: a graph with a prompt in it fits that prompt only.

Decodes follow the prompts. Both at once were tried, on multiprocessors of their own and in two streams: slower, and no
faster (docs/benchmarks.md).
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


def worth_it(spans: Sequence[Span]) -> bool:
    """Whether these prompts are better launched one by one than all in one launch of the slower kernel."""
    pairs = sum((last - first) * kv_len for _, first, last, kv_len in spans)
    return len(spans) == 1 or pairs >= WORTH_PAIRS * len(spans)


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
        self.scale = spec.head_dim**-0.5

    def _prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """q (n, H, D), k and v (kv_len, G, D), causal to the end of k -> out (n, H, D)."""
        few = q.shape[0] * q.shape[1] < FEW_TILES * TILE_ROWS
        self._flash(q[None], k[None], v[None], out=out[None], softmax_scale=self.scale, is_causal=True,
                    num_splits=0 if few else 1)  # fmt: skip

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        spans = batch.spans
        flat = torch.empty_like(q).flatten(1) if out is None else out
        heads = flat.view_as(q)
        if spans and not window and worth_it(spans):
            for slot, first, last, kv_len in spans:
                self._prompt(q[first:last], k[slot, :kv_len], v[slot, :kv_len], heads[first:last])
        elif spans:
            tokens, prompts = batch.num_prefill_tokens, len(spans)
            self._prefill(q[:tokens], k, v, batch.slots[:prompts], batch.q_starts[: prompts + 1],
                          batch.kv_lens[:prompts], self.scale, window, out=flat[:tokens])  # fmt: skip
        self.decode_half(q, k, v, batch, window, flat)
        return flat
