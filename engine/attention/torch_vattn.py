"""The judge: plain PyTorch attention, one sequence at a time, in float32, on views of the exact length."""

from __future__ import annotations

import torch

from engine.attention.base import Caps, backends, placed
from engine.loading.spec import ModelSpec
from engine.runner.batch import Batch


@backends.register("torch_vattn")
class TorchVattn:
    """softmax(q k^T / sqrt(D)) v, written out."""

    caps = Caps(device="any", dtypes=("float32", "bfloat16", "float16"), graphs=False, rank=90)

    @classmethod
    def missing(cls) -> str | None:
        """Nothing: PyTorch is always here."""
        return None

    def __init__(self, spec: ModelSpec) -> None:
        self.scale = spec.head_dim**-0.5

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        heads, groups = q.shape[1], k.shape[2]
        attended = torch.empty_like(q)  # (N, H, D)
        bounds = batch.q_starts.tolist()
        for b, (slot, kv_len) in enumerate(zip(batch.slots.tolist(), batch.kv_lens.tolist(), strict=True)):
            queries = q[bounds[b] : bounds[b + 1]].transpose(0, 1).float()  # (H, n, D)
            keys = k[slot, :kv_len].transpose(0, 1).float().repeat_interleave(heads // groups, dim=0)  # (H, len, D)
            values = v[slot, :kv_len].transpose(0, 1).float().repeat_interleave(heads // groups, dim=0)
            count = queries.shape[1]
            position = torch.arange(kv_len - count, kv_len, device=q.device)[:, None]  # (n, 1)
            other = torch.arange(kv_len, device=q.device)[None, :]  # (1, len)
            hidden = other > position
            if window:
                hidden |= other <= position - window
            scores = (queries @ keys.transpose(1, 2) * self.scale).masked_fill(hidden, float("-inf"))
            done = torch.softmax(scores, dim=-1) @ values  # (H, n, D)
            attended[bounds[b] : bounds[b + 1]] = done.transpose(0, 1).to(attended.dtype)
        return placed(attended.flatten(1), out)
