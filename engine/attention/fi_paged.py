"""FlashInfer as it is meant: block tables over one pool. The paged twin of fi_vattn, for research."""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.base import Caps, backends, placed
from engine.attention.fi_vattn import FlashInferRuns, Pages, filled, flashinfer_missing
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("fi_paged")
class FiPaged:
    """The same kernels as fi_vattn, with as many table entries as a sequence has blocks."""

    caps = Caps(
        device="cuda", dtypes=("bfloat16", "float16"), head_dims=(64, 128, 256), graphs=False, paged=True, rank=70
    )

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no CUDA device, no FlashInfer or no compiler for it."""
        return flashinfer_missing()

    def __init__(self, spec: ModelSpec) -> None:
        self._runs = FlashInferRuns(spec, self._pages_of)
        self._table: tuple[np.ndarray, int] | None = None  # of the step under way

    def _pages_of(self, batch: Batch) -> Pages:
        """The blocks of each sequence, one after the other. batch: on the host."""
        assert self._table is not None
        table, block_tokens = self._table
        counts, indptr, last_len = filled(batch.kv_lens.numpy(), block_tokens)
        blocks = [table[slot, :count] for slot, count in zip(batch.slots.tolist(), counts.tolist(), strict=True)]
        return Pages(indptr, np.concatenate(blocks), last_len)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        if batch.paged is None:
            raise InvariantError("a paged backend runs on a paged store")
        self._table = (batch.paged.host_table, batch.paged.block_tokens)
        return placed(self._runs.attend(q, k, v, batch, window), out)
