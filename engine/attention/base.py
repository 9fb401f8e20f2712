"""What an attention backend promises, as data, and what it does, as one call.

A slab backend reads K and V of a slot as an ordinary strided tensor. It never sees pages: everything below a sequence's
length is mapped, nothing beyond is. A paged backend (research) reads Batch.paged instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from engine.loading.spec import ModelSpec
    from engine.runner.batch import Batch


@dataclass(frozen=True, slots=True)
class Caps:
    """Where a backend fits. dtypes: torch names. head_dims: empty = any. over_read_tokens: how far past a sequence's
    length it may read; the allocator maps none, so only 0 is taken. graphs: every launch reads lengths and slots on
    the device, so a decode graph may replay it. paged: wants block tables, of blocks of a multiple of block_multiple
    tokens. rank: where nobody measured, the lowest of those that fit is `auto`."""

    device: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    over_read_tokens: int = 0
    batch_invariant: bool = False
    graphs: bool = True
    paged: bool = False
    block_multiple: int = 1
    rank: int = 100


class AttentionBackend(Protocol):
    """One step's attention, layer by layer."""

    caps: Caps  # read-only; composed backends have their own

    @classmethod
    def missing(cls) -> str | None:
        """Why this machine cannot run it, or None."""

    def __init__(self, spec: ModelSpec) -> None: ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Causal attention. q: (N, H, D); k, v: (S, C, G, D) strided slab views (paged: blocks). Returns (N, H * D), in
        `out` where given.

        Query i of chunk b sits at position kv_lens[b] - length_b + i and attends to its own position and
        those before it, the last `window` of them where window > 0.
        """


backends: Registry[type[AttentionBackend]] = Registry("attention backend", "engine.attention")


def placed(attended: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """What a backend returns that cannot write into `out` itself."""
    return attended if out is None else out.copy_(attended)
