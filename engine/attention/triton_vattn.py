"""Attention over slabs on a GPU by our own Triton kernels: chunks of prompts by one, decodes by another.

A batch's prompts stand before its decodes (Batch.spans); each part is one launch that reads lengths on the device, so
both can stand in a CUDA graph. Where it was measured faster, a hybrid batch is one launch for both. Nothing at or past
a sequence's length is read.
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
    from tessera_kernels.triton_attention_hybrid import HybridConfig, HybridWorkspace


class DecodeHalf:
    """Decodes of a batch by the split kernel, with its workspace; shared by the backends that run on CUDA."""

    def __init__(self, spec: ModelSpec) -> None:
        from tessera_kernels import triton_attention_decode

        self._kernel = triton_attention_decode
        self._spec, self.scale = spec, spec.head_dim**-0.5
        self.pdl = False  # whether the kernel may start while the one before ends
        # a graph captured with a workspace goes on using it, so outgrown ones are kept
        self._workspaces: list[tuple[int, DecodeWorkspace]] = []

    def _workspace(self, q: torch.Tensor, sequences: int) -> DecodeWorkspace:
        if not self._workspaces or self._workspaces[-1][0] < sequences:
            room = max(512, 1 << (sequences - 1).bit_length())
            spec = self._spec
            made = self._kernel.DecodeWorkspace.make(q, spec.heads, spec.kv_heads, spec.head_dim, room)
            self._workspaces.append((room, made))
        return self._workspaces[-1][1]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int, out: torch.Tensor,
        table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Rows behind batch.num_prefill_tokens, one a sequence, into the same rows of out (N, H * D). table: of
        blocks, where k and v are such."""
        tokens, prompts = batch.num_prefill_tokens, len(batch.spans)
        slots, kv_lens = batch.slots[prompts:], batch.kv_lens[prompts:]
        if q.shape[0] - tokens != slots.shape[0]:
            raise InvariantError(
                f"{q.shape[0] - tokens} rows behind the prompts for {slots.shape[0]} decodes; Batch.spans is wrong"
            )
        if slots.shape[0]:
            workspace = self._workspace(q, slots.shape[0])
            self._kernel.attention_decode(
                q[tokens:], k, v, slots, kv_lens, self.scale, workspace, window, out=out[tokens:], pdl=self.pdl,
                table=table,
            )  # fmt: skip


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
    """Two launches a layer at most: prompts, decodes; or one for both."""

    caps = Caps(device="cuda", dtypes=("bfloat16", "float16", "float32"), rank=20)
    hybrid: HybridConfig | None = None  # for tests and measurements; None: the measured setting, if any

    @classmethod
    def missing(cls) -> str | None:
        """A reason when there is no CUDA device or no Triton."""
        return cuda_missing()

    def __init__(self, spec: ModelSpec) -> None:
        from tessera_kernels import triton_attention_hybrid
        from tessera_kernels.triton_attention_prefill import attention_prefill

        self._prefill, self._hybrid, self.decode_half = attention_prefill, triton_attention_hybrid, DecodeHalf(spec)
        self.scale, self._spec = spec.head_dim**-0.5, spec
        self._workspaces: list[HybridWorkspace] = []  # outgrown ones are kept, as in DecodeHalf

    def _in_one(self, q: torch.Tensor, sequences: int) -> HybridWorkspace | None:
        """The workspace of a single launch, where hybrid batches run so."""
        spec = self._spec
        config = self.hybrid or self._hybrid.measured_config(q, spec.head_dim)
        if config is None:
            return None
        made = self._workspaces
        room = sequences * spec.kv_heads
        if not made or made[-1].config != config or made[-1].decode.arrived.shape[0] < room:
            most = max(512, 1 << (sequences - 1).bit_length())
            made.append(self._hybrid.HybridWorkspace.make(q, spec.heads, spec.kv_heads, spec.head_dim, most, config))
        return made[-1]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0
    ) -> torch.Tensor:
        """See AttentionBackend."""
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        prompts, tokens = len(batch.spans), batch.num_prefill_tokens
        if prompts and tokens < q.shape[0] and batch.counts is not None:
            workspace = self._in_one(q, batch.slots.shape[0])
            if workspace is not None:
                return self._hybrid.attention_hybrid(q, k, v, batch.slots, batch.q_starts, batch.kv_lens, batch.counts,
                                                     self.scale, workspace, window, out)  # fmt: skip
        if prompts:
            self._prefill(q[:tokens], k, v, batch.slots[:prompts], batch.q_starts[: prompts + 1],
                          batch.kv_lens[:prompts], self.scale, window, out=out[:tokens])  # fmt: skip
        self.decode_half(q, k, v, batch, window, out)
        return out
