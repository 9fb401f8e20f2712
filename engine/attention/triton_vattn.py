"""Attention over slabs on a GPU by our own Triton kernels: chunks of prompts by one, decodes by another.

A batch's prompts stand before its decodes (Batch.spans); each part is one launch that reads lengths on the device, so
both can stand in a CUDA graph. (One launch for both, as in POD-Attention, was built and measured 0.92 times as fast on
an H200: docs/benchmarks.md.) Nothing at or past a sequence's length is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.attention.base import Caps, backends
from engine.core.errors import InvariantError
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch

if TYPE_CHECKING:
    from tessera_kernels.triton_attention_decode import DecodeWorkspace


# an early start gains 1 to 2 % of a layer at 16 sequences and more, and loses 3 % at one (H200)
EARLY_SEQUENCES = 8


class DecodeHalf:
    """Decodes of a batch by the split kernel, with its workspaces; shared by the backends that run on CUDA."""

    def __init__(self, spec: ModelSpec) -> None:
        from tessera_kernels import triton_attention_decode
        from tessera_kernels.triton_support import starts_early

        self._kernel = triton_attention_decode
        self._spec, self.scale = spec, spec.head_dim**-0.5
        self.pdl = starts_early()
        # by window; a graph captured with a workspace goes on using it, so outgrown ones are kept
        self._workspaces: dict[int, list[tuple[int, DecodeWorkspace]]] = {}
        self._lined_up: dict[int, Batch] = {}  # by window: the step whose line stands in the workspace

    def _workspace(self, q: torch.Tensor, sequences: int, max_tokens: int, window: int) -> DecodeWorkspace:
        made = self._workspaces.setdefault(window, [])
        if not made or made[-1][0] < sequences:
            room = max(512, 1 << (sequences - 1).bit_length())
            spec = self._spec
            made.append((room, self._kernel.DecodeWorkspace.make(q, spec.heads, spec.kv_heads, spec.head_dim, room,
                                                                 max_tokens, window=window)))  # fmt: skip
            self._lined_up.pop(window, None)
        return made[-1][1]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int, out: torch.Tensor,
        table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Rows behind batch.num_prefill_tokens, one a sequence, into the same rows of out (N, H * D). table: of
        blocks, where k and v are such. A step's layers bring the same Batch, another step another one."""
        tokens, prompts = batch.num_prefill_tokens, len(batch.spans)
        slots, kv_lens = batch.slots[prompts:], batch.kv_lens[prompts:]
        if q.shape[0] - tokens != slots.shape[0]:
            raise InvariantError(
                f"{q.shape[0] - tokens} rows behind the prompts for {slots.shape[0]} decodes; Batch.spans is wrong"
            )
        if slots.shape[0]:
            most = k.shape[1] if table is None else k.shape[1] * table.shape[1]
            workspace = self._workspace(q, slots.shape[0], most, window)
            if self._lined_up.get(window) is not batch:
                self._kernel.line_up(slots, kv_lens, workspace)
                self._lined_up[window] = batch
            self._kernel.attention_decode(q[tokens:], k, v, self.scale, workspace, out=out[tokens:],
                                          pdl=self.pdl and slots.shape[0] >= EARLY_SEQUENCES, table=table)  # fmt: skip


def cuda_missing() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


@backends.register("triton_vattn")
class TritonVattn:
    """Two launches a layer at most: prompts, decodes."""

    caps = Caps(device="cuda", dtypes=("bfloat16", "float16", "float32"), rank=20)

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
        if out is None:
            out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        prompts, tokens = len(batch.spans), batch.num_prefill_tokens
        if prompts:
            self._prefill(q[:tokens], k, v, batch.slots[:prompts], batch.q_starts[: prompts + 1],
                          batch.kv_lens[:prompts], self.scale, window, out=out[:tokens])  # fmt: skip
        self.decode_half(q, k, v, batch, window, out)
        return out
