"""The encoded attention layer: projections here, maps on the secure side, attention and cache on what is encoded.

The piece stands where the plain one stands (engine/parts/layer.py) and runs any attention backend unchanged. It knows
no keys; what it holds of a row is what the compute device may see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from engine.attention.base import AttentionBackend
from engine.runner.batch import Batch
from engine.scx.config import ScxConfig

if TYPE_CHECKING:  # an engine without SCX loads no cryptography
    from engine.parts.kernel_set import Linear
    from engine.scx.secure import SealOrder, SecureSide
    from tessera_kernels.triton_seal import BlockShuffle

# observer(view, layer, tensors): what the compute device gets to see of an encoded layer, by what an adversary has:
#   "V1" a copy of the cache:     k, v (N, G, D), this step's rows as written, before blocks are shuffled; slots and
#                                 positions (N,)
#   "V3" also what crosses live:  q (R, H, D); with --scx-page-seal the order told to the device, after the shuffle:
#                                 slots, firsts (P,), order (P, G, B), as SealOrder
#   "V4" also what it computes:   qkv (N, (H + 2G) * D) before it is encoded; attended and decoded (N, H * D). Hidden
#                                 states, logits and token ids are there too, and are not called
# V2, the caches of all layers, is not called: the slabs of plain layers are as they are.
# Tensors are not copies: keep none beyond the call without cloning it.
Observer = Callable[[str, int, dict[str, torch.Tensor]], None]


@dataclass(eq=False, slots=True)
class Scx:
    """What all encoded layers of an engine share. observer: None, or called with what crosses."""

    config: ScxConfig
    secure: SecureSide
    observer: Observer | None = None
    backend: AttentionBackend | None = None  # in place of the engine's, where one key a request is not enough
    # K and V views by encoded layer; no text form: most of a slab is not mapped, and what is must not be in a log
    slabs: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    wide: bool = False  # projections come in float32, as Scheme.matrices says
    _shuffler: BlockShuffle | None = field(default=None, repr=False)

    def seal(self, layer: int, batch: Batch) -> None:
        """Shuffle the blocks that a step made full, between the layer's encode and its decode."""
        full = self.secure.seal(layer, batch) if self.config.page_seal else None
        if full is not None:
            self._shuffle(full._replace(order=full.order[None]), self.config.layers.index(layer))

    def seal_all(self, batch: Batch) -> None:
        """The same for all encoded layers, behind a step that was replayed as a whole."""
        full = self.secure.seal_all(batch) if self.config.page_seal else None
        if full is not None:
            self._shuffle(full, 0)

    def _shuffle(self, full: SealOrder, first: int) -> None:
        """full.order: (L, P, G, B), of the encoded layers from number `first` on."""
        layers = self.config.layers[first : first + full.order.shape[0]]
        if self.secure.in_stream:
            if self._shuffler is None:
                from tessera_kernels.triton_seal import BlockShuffle

                self._shuffler = BlockShuffle([self.slabs[layer] for layer in self.config.layers])
            self._shuffler(*full, layer=first)
        else:
            for layer, order in zip(layers, full.order, strict=True):
                shuffle_blocks(*self.slabs[layer], full._replace(order=order))
        if self.observer is not None:
            for layer, order in zip(layers, full.order, strict=True):
                self.observer("V3", layer, full._replace(order=order)._asdict())


@dataclass(eq=False, slots=True)
class ScxAttention:
    """One layer's attention over encoded slabs."""

    layer: int
    scx: Scx
    backend: AttentionBackend
    qkv: Linear
    out: Linear
    k: torch.Tensor  # (S, C, G, D) slab view of this layer
    v: torch.Tensor
    window: int

    def __post_init__(self) -> None:
        self.scx.slabs[self.layer] = (self.k, self.v)

    def __call__(self, x: torch.Tensor, batch: Batch, add_to: torch.Tensor) -> None:
        """x: (N, C), normed; add_to: (N, C) residual stream, updated in place. Raises ScxError before that."""
        q = self.encode(self.qkv(x), batch)
        self.out(self.decode(self.attend(q, batch), batch), add_to=add_to)

    def encode(self, projected: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Projections (N, (H + 2G) * D) -> queries (N, H, D), in `out` where given; keys and values are stored."""
        q = self.scx.secure.encode_store(self.layer, projected, batch, self.k, self.v, out)
        if self.scx.observer is not None:
            self._show(batch, q, projected)
        return q

    def attend(self, q: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Attention alone: queries (N, H, D) -> (N, H * D), in `out` where given, still encoded.

        Blocks that became full are shuffled behind it: later steps see these rows whole, whatever their order.
        """
        attended = self.backend.attend(q, self.k, self.v, batch, self.window, out)
        if not self.scx.secure.recording:  # what a graph will do to its steps' blocks, nobody knows yet
            self.scx.seal(self.layer, batch)
        return attended

    def decode(self, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(N, H * D) of the values themselves."""
        decoded = self.scx.secure.decode(self.layer, attended, batch)
        if self.scx.observer is not None:
            self.scx.observer("V4", self.layer, {"attended": attended, "decoded": decoded})
        return decoded

    def _show(self, batch: Batch, q: torch.Tensor, projected: torch.Tensor) -> None:
        """Tell the observer what stands on the compute device after encoding."""
        assert self.scx.observer is not None
        where = (batch.token_slots.long(), batch.positions.long())
        rows = {"k": self.k[where], "v": self.v[where], "slots": batch.token_slots, "positions": batch.positions}
        self.scx.observer("V1", self.layer, rows)
        self.scx.observer("V3", self.layer, {"q": q})
        self.scx.observer("V4", self.layer, {"qkv": projected if projected.dim() == 2 else projected.sum(0)})


def shuffle_blocks(k: torch.Tensor, v: torch.Tensor, full: SealOrder) -> None:
    """Permute the rows of whole blocks in place, K and V alike and each KV head on its own. k, v: (S, C, G, D).

    Exact for every later query: it sees a block whole, and attention does not depend on the order of what it sees.
    """
    size = full.order.shape[2]
    slots, firsts = full.slots[:, None, None], full.firsts[:, None, None]  # (P, 1, 1)
    heads = torch.arange(k.shape[2], device=k.device)[None, :, None]
    into = firsts + torch.arange(size, device=k.device)
    for slab in (k, v):
        slab[slots, into, heads] = slab[slots, firsts + full.order, heads]
