"""Steps that no one graph holds, cut where attention stands: a CUDA graph from each attention to the next.

Products, norms and stores of a step depend on its number of tokens alone, so they are recorded for a few numbers and a
step is padded up to the next. Attention depends on every length, and the fastest kernels for prompts take theirs from
the host, so it is launched anew in every layer, on the real rows. The host launches two or three things a layer
instead of about nine. Where an encoded layer's secure side has to be waited for, it is asked in attention's place, and
decodes run in pieces, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.runner.batch import Batch, Paged

Replay = Callable[[], object]
Record = Callable[[Replay], Replay]  # runs the work once or more, and gives back what repeats it
Leaves = tuple[tuple[int, ...], torch.dtype]  # shape of a token's row, and type


class SplitLayer(Protocol):
    """A decoder layer in three; see CudaLayer. selective: as a model's last, it can leave out rows without logits.
    leaves: what before() gives to attend()."""

    selective: bool
    leaves: Leaves

    def before(self, hidden: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (N, C) -> queries (N, H, D), keys and values stored at batch.places; or projections, where attend()
        encodes and stores."""

    def attend(self, q: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """What before() gave -> (N, H * D), in `out` where given."""

    def after(self, hidden: torch.Tensor, attended: torch.Tensor, batch: Batch) -> object:
        """Onto hidden (N, C) in place."""

    def finish(self, q: torch.Tensor, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The rest of the last layer, for the rows that get logits: (R, C)."""


class SplitModel(Protocol):
    """A decoder of such layers."""

    layers: list[SplitLayer]
    embed: Callable[[torch.Tensor], torch.Tensor]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, C) -> (R, V) float32."""


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that are recorded: few enough to record at start, close enough to waste little."""
    sizes = {1, 16, 32, *range(64, 1537, 64), *range(1664, 2049, 128), *range(2560, 8193, 512), most}
    return sorted(size for size in sizes if size <= most)


class GraphRecorder:
    """Records CUDA graphs that share one pool: what they leave lies outside of it, so any may follow any."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, work: Replay) -> Replay:
        """Run the work once, so that everything is compiled, then record it."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


@dataclass(slots=True)
class _Buffers:
    """What pieces read and leave, of the largest size; smaller ones use the first rows."""

    tokens: torch.Tensor  # (N,) int64
    positions: torch.Tensor  # (N,) int32, as the two below
    slots: torch.Tensor
    rows: torch.Tensor
    hidden: torch.Tensor  # (N, C)
    left: list[torch.Tensor]  # (N, *) of each layer, one memory for all that leave the same: queries (N, H, D)
    attended: torch.Tensor  # (N, H * D)


class PieceGraphs:
    """Steps of up to `most` tokens. Record once, before serving."""

    def __init__(self, model: SplitModel, device: torch.device, most: int, *, heads: int, head_dim: int,
                 record: Record | None = None) -> None:  # fmt: skip
        """record: what records a piece; CUDA graphs unless given."""
        self._model, self._sizes = model, piece_sizes(most)
        self._record = record or GraphRecorder(device)
        self._pieces: dict[int, list[Replay]] = {}
        width = model.embed(torch.zeros(1, dtype=torch.int64, device=device))
        floats = {"dtype": width.dtype, "device": device}
        left = {kind: torch.zeros(most, *kind[0], dtype=kind[1], device=device) for kind in
                {layer.leaves for layer in model.layers}}  # fmt: skip
        positions, slots, rows = (torch.zeros(most, dtype=torch.int32, device=device) for _ in range(3))
        self._buffers = _Buffers(
            torch.zeros(most, dtype=torch.int64, device=device), positions, slots, rows,
            torch.zeros(most, width.shape[1], **floats), [left[layer.leaves] for layer in model.layers],
            torch.zeros(most, heads * head_dim, **floats),
        )  # fmt: skip

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Record every size, largest first."""
        self._buffers.slots.fill_(-1)  # nothing is stored meanwhile
        for done, size in enumerate(reversed(self._sizes), 1):
            self._pieces[size] = [self._record(work) for work in self._work(size)]
            if progress is not None:
                progress(done, len(self._sizes))

    def _work(self, size: int) -> list[Replay]:
        """The pieces of a step of `size` tokens, as functions on the buffers."""
        b, model = self._buffers, self._model
        none = b.slots[:0]
        places = Paged(none, np.empty(0, dtype=np.int32), 0, b.slots[:size], b.rows[:size])
        step = Batch(b.tokens[:size], b.positions[:size], b.slots[:size], none, none, none, none, paged=places)
        hidden, left, attended = b.hidden[:size], [rows[:size] for rows in b.left], b.attended[:size]
        layers = model.layers

        def first() -> None:
            hidden.copy_(model.embed(step.tokens))
            layers[0].before(hidden, step, left[0])

        def between(index: int) -> None:
            layers[index - 1].after(hidden, attended, step)
            layers[index].before(hidden, step, left[index])

        def last() -> None:
            layers[-1].after(hidden, attended, step)

        ends = [] if layers[-1].selective else [last]
        return [first, *(lambda i=i: between(i) for i in range(1, len(layers))), *ends]  # type: ignore[misc]

    def fits(self, batch: Batch) -> bool:
        """Whether a batch has few enough tokens."""
        return bool(self._pieces) and batch.num_tokens <= self._sizes[-1]

    def __call__(self, batch: Batch) -> torch.Tensor:
        """batch: one that fits, on the device, placed, its tokens known. Returns (R, V) float32 logits."""
        b, count = self._buffers, batch.num_tokens
        size = self._sizes[bisect_left(self._sizes, count)]
        slots, rows = batch.places
        for buffer, given in ((b.tokens, batch.tokens), (b.positions, batch.positions), (b.slots, slots),
                              (b.rows, rows)):  # fmt: skip
            buffer[:count].copy_(given)
        b.slots[count:size].fill_(-1)  # padding stores nothing
        layers, pieces = self._model.layers, self._pieces[size]
        left, attended = [rows[:count] for rows in b.left], b.attended[:count]
        for layer, replay, given in zip(layers[:-1], pieces, left, strict=False):
            replay()
            layer.attend(given, batch, attended)
        pieces[len(layers) - 1]()
        if layers[-1].selective:
            return self._model.logits(layers[-1].finish(left[-1], b.hidden[:count], batch))
        layers[-1].attend(left[-1], batch, attended)
        pieces[-1]()
        return self._model.logits(b.hidden.index_select(0, batch.sample_rows))
