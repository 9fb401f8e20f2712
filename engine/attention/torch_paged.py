"""The judge of block tables: gathers each sequence's blocks into one piece and lets the plain backend attend."""

from __future__ import annotations

import dataclasses

import torch

from engine.attention.base import Caps, backends
from engine.attention.torch_vattn import TorchVattn
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("torch_paged")
class TorchPaged:
    """torch_vattn behind a gather; slow, and right if torch_vattn is."""

    caps = Caps(device="any", dtypes=("float32", "bfloat16", "float16"), graphs=False, paged=True, rank=95)

    @classmethod
    def missing(cls) -> str | None:
        """Nothing: PyTorch is always here."""
        return None

    def __init__(self, spec: ModelSpec) -> None:
        self._plain = TorchVattn(spec)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        paged = batch.paged
        if paged is None:
            raise InvariantError("a paged backend runs on a paged store")
        blocks = -(-int(batch.kv_lens.max()) // paged.block_tokens)
        table = paged.table[batch.slots.long(), :blocks].long()  # (B, M); entries past a length are never looked at
        flat = [view[table].flatten(1, 2) for view in (k, v)]  # (B, M * T, G, D)
        rows = torch.arange(batch.slots.shape[0], dtype=torch.int32, device=q.device)
        return self._plain.attend(q, flat[0], flat[1], dataclasses.replace(batch, slots=rows, paged=None), window,
                                  out)  # fmt: skip
