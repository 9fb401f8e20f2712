"""FlashAttention 2 over block tables, where `flash-attn` is installed: the paged twin of fa_vattn, for research.

The FlashAttention 3 build that fa_vattn uses (fa3-fwd 0.0.3) refuses block tables.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from engine.attention.base import Caps, backends, placed
from engine.attention.triton_vattn import cuda_missing
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("fa_paged")
class FaPaged:
    """One launch for all prompts, one for all decodes. Blocks are multiples of 256 tokens, as its kernels want."""

    caps = Caps(
        device="cuda", dtypes=("bfloat16", "float16"), head_dims=(64, 96, 128, 192, 256), paged=True,
        block_multiple=256, rank=80,
    )  # fmt: skip

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no CUDA device or no FlashAttention with block tables."""
        absent = cuda_missing()
        if absent:
            return absent
        if importlib.util.find_spec("flash_attn") is None:
            three = importlib.util.find_spec("fa3_fwd_interface") is not None
            why = "fa3-fwd is here and refuses block tables" if three else "fa3-fwd would refuse block tables too"
            return f"FlashAttention 2 is not installed (pip install flash-attn), and {why}"
        return None

    def __init__(self, spec: ModelSpec) -> None:
        import flash_attn

        self._flash: Any = flash_attn
        self.scale = spec.head_dim**-0.5

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        if batch.paged is None:
            raise InvariantError("a paged backend runs on a paged store")
        table = batch.paged.table
        attended = torch.empty_like(q)
        prompts, tokens = len(batch.spans), batch.num_prefill_tokens
        options = {"softmax_scale": self.scale, "causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}
        if prompts:
            lens = torch.nn.functional.pad(batch.kv_lens[:prompts].cumsum(0, dtype=torch.int32), (1, 0))
            attended[:tokens] = self._flash.flash_attn_varlen_func(
                q[:tokens], k, v, batch.q_starts[: prompts + 1], lens,
                max(span.last - span.first for span in batch.spans), max(span.kv_len for span in batch.spans),
                block_table=table[batch.slots[:prompts].long()], **options,
            )  # fmt: skip
        if batch.slots.shape[0] > prompts:
            slots = batch.slots[prompts:].clamp(min=0).long()  # padding rows have length 0
            attended[tokens:] = self._flash.flash_attn_with_kvcache(
                q[tokens:, None], k, v, cache_seqlens=batch.kv_lens[prompts:], block_table=table[slots], **options
            )[:, 0]
        return placed(attended.flatten(1), out)
