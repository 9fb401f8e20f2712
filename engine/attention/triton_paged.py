"""The paged twin of triton_vattn: the same kernels and tiles, with a block table between a token and its place.

For research: what differs in time is the table and the loss of bulk copies, which cannot follow one.
"""

from __future__ import annotations

import torch

from engine.attention.base import Caps, backends
from engine.attention.triton_vattn import DecodeHalf, cuda_missing
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("triton_paged")
class TritonPaged:
    """Two launches a layer at most: prompts, decodes."""

    caps = Caps(device="cuda", dtypes=("bfloat16", "float16", "float32"), paged=True, rank=60)

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no CUDA device or no Triton."""
        return cuda_missing()

    def __init__(self, spec: ModelSpec) -> None:
        from tessera_kernels.triton_attention_prefill import attention_prefill

        self._prefill, self.decode_half = attention_prefill, DecodeHalf(spec)
        self.scale = spec.head_dim**-0.5

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        if batch.paged is None:
            raise InvariantError("a paged backend runs on a paged store")
        table = batch.paged.table
        if out is None:
            out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        prompts, tokens = len(batch.spans), batch.num_prefill_tokens
        if prompts:
            self._prefill(q[:tokens], k, v, batch.slots[:prompts], batch.q_starts[: prompts + 1],
                          batch.kv_lens[:prompts], self.scale, window, out=out[:tokens], table=table)  # fmt: skip
        self.decode_half(q, k, v, batch, window, out, table)
        return out
