"""Vectorised attention over slabs on a CPU: the C++ kernel of tessera_kernels, every bit independent of the batch."""

from __future__ import annotations

import torch

from engine.attention.base import Caps, backends, placed
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("cpu_vattn")
class CpuVattn:
    """One call over the whole ragged batch, prefill chunks and decodes alike."""

    caps = Caps(device="cpu", dtypes=("float32", "bfloat16"), batch_invariant=True, rank=10)

    @classmethod
    def missing(cls) -> str | None:
        """A reason when the C++ kernels were not built or this CPU lacks their instructions."""
        try:
            from tessera_kernels import native
        except ImportError as error:
            return f"the C++ kernels are not built ({error}); run `pip install -e .`"
        return None if native.available(torch.float32) else "this CPU lacks the vector instructions the kernels use"

    def __init__(self, spec: ModelSpec) -> None:
        from tessera_kernels.attention_slots import attention

        self._attention = attention
        self.scale = spec.head_dim**-0.5

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        return placed(self._attention(q, k, v, batch.slots, batch.q_starts, batch.kv_lens, self.scale, window), out)
