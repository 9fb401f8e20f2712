"""Attention over slabs on a Hopper GPU: FlashAttention 3 for prompts, our split kernel for decodes.

FlashAttention's bulk loads stop at the bounds of the tensor they are given, not at a sequence's length, so each prompt
is given as a view of exactly its length (K[slot, :kv_len]); a whole slab with lengths beside it would be read past
what is mapped. Lengths come from Batch.spans, on the host: a graph with a prompt in it fits that prompt only. The
build that is installed as fa3-fwd 0.0.3 refuses sliding windows.
"""

from __future__ import annotations

import importlib.util

import torch

from engine.attention.base import Caps, backends
from engine.attention.triton_vattn import DecodeHalf, cuda_missing
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("fa_vattn")
class FaVattn:
    """One FlashAttention 3 launch a prompt, one launch for all decodes."""

    caps = Caps(device="cuda", dtypes=("bfloat16", "float16"), head_dims=(64, 96, 128, 192, 256), rank=10, window=False)

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
        from fa3_fwd_interface import flash_attn_func

        self._flash, self.decode_half = flash_attn_func, DecodeHalf(spec)
        self.scale = spec.head_dim**-0.5

    def _prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (n, H, D), k and v (kv_len, G, D), causal to the end of k -> (n, H, D)."""
        done = self._flash(q[None], k[None], v[None], softmax_scale=self.scale, causal=True)
        attended: torch.Tensor = done[0] if isinstance(done, tuple) else done
        return attended[0] if attended.dim() == 4 else attended

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0
    ) -> torch.Tensor:
        """See AttentionBackend."""
        if window:
            raise InvariantError("fa_vattn has no sliding windows")
        spans = batch.spans
        if len(spans) == 1 and spans[0].last == q.shape[0]:
            slot, kv_len = spans[0].slot, spans[0].kv_len
            return self._prompt(q, k[slot, :kv_len], v[slot, :kv_len]).reshape(q.shape[0], -1)
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for slot, first, last, kv_len in spans:
            done = self._prompt(q[first:last], k[slot, :kv_len], v[slot, :kv_len])
            out[first:last] = done.reshape(last - first, -1)
        self.decode_half(q, k, v, batch, window, out)
        return out
