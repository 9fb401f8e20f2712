"""CUDA graphs of pure decode steps: one for each of a few batch sizes, replayed with new numbers in fixed buffers.

Sampling stands in the graph too: the rules of a step's rows are such numbers.

Slabs, weights and workspaces never move, so a captured launch stays valid for the life of the engine. A batch is
padded up to the next size with rows of no slot: their length is 0 and nothing of them is stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.models import Model
from engine.runner.batch import Batch
from engine.runner.device_sampler import DeviceSampler, GraphRules, choose
from engine.runner.newest import NewestTokens
from engine.runner.sampler import Pick


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: every one that is cheap to miss by a few rows, up to `most`."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, 4097, 64), most}
    return sorted(size for size in sizes if size <= most)


@dataclass(slots=True)
class _Graph:
    """One captured size: inputs is the int32 buffer behind the batch's fields; picked (size,) int64."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    picked: torch.Tensor


class DecodeGraphs:
    """Decode steps of up to `most` sequences, sampled by any rules. Capture once, before serving."""

    def __init__(
        self,
        model: Model,
        place: Callable[[Batch], Batch],
        newest: NewestTokens,
        sampler: DeviceSampler,
        device: torch.device,
        most: int,
    ) -> None:
        """place: as KvStore.place. most: sequences of the largest graph."""
        self._place = place
        self._model, self._newest, self._argmax, self._device = model, newest, sampler.argmax, device
        self._sizes = graph_sizes(most)
        self._rules = GraphRules(most, sampler.vocab, device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Record every size, largest first, so that all share one pool of memory."""
        pool = torch.cuda.graph_pool_handle()
        for done, size in enumerate(reversed(self._sizes), 1):
            self._graphs[size] = self._record(size, pool)
            if progress is not None:
                progress(done, len(self._sizes))

    def room(self, rows: int) -> int:
        """The next captured size; `rows` itself beyond the largest."""
        place = bisect_left(self._sizes, rows)
        return self._sizes[place] if place < len(self._sizes) else rows

    def fits(self, batch: Batch, picks: Sequence[Pick]) -> bool:
        """Whether a batch is a pure decode that a captured graph can run."""
        return (
            bool(self._graphs)
            and not batch.spans
            and batch.num_tokens <= self._sizes[-1]
            and batch.sample_rows.shape[0] == batch.num_tokens
            and self._rules.fits(picks)
        )

    def __call__(self, host: Batch, picks: Sequence[Pick]) -> torch.Tensor:
        """host: a batch that fits, on the CPU; picks: a rule a row. Returns (B,) int64 ids on the device, valid until
        the next replay."""
        count = host.num_tokens
        size = self.room(count)
        captured = self._graphs[size]
        staged = torch.empty(captured.inputs.shape[0], dtype=torch.int32, pin_memory=True)
        _fill(staged.numpy(), host, count, size)
        captured.inputs.copy_(staged, non_blocking=True)
        self._rules.load(picks)
        captured.graph.replay()
        return captured.picked[:count]

    def _record(self, size: int, pool: tuple[int, int]) -> _Graph:
        inputs = torch.zeros(7 * size + 1, dtype=torch.int32, device=self._device)
        staged = torch.zeros(7 * size + 1, dtype=torch.int32)
        _fill(staged.numpy(), None, 0, size)
        inputs.copy_(staged)
        batch = _fields(inputs, size)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # compiles and loads what the recording may not
            for _ in range(2):
                self._step(batch)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            picked = self._step(batch)
        return _Graph(graph, inputs, picked)

    def _step(self, batch: Batch) -> torch.Tensor:
        known = replace(batch, tokens=self._newest.resolve(batch))
        picked = choose(self._model(self._place(known)), self._rules.table[: batch.num_tokens], self._argmax)
        self._newest.note(batch, picked)
        return picked


def _fields(inputs: torch.Tensor, size: int) -> Batch:
    """The buffer's views: tokens, positions, token_slots, slots, kv_lens, sample_rows of `size`, q_starts of size+1."""
    tokens, positions, token_slots, slots, kv_lens, sample_rows, q_starts = inputs.split([size] * 6 + [size + 1])
    return Batch(tokens, positions, token_slots, slots, q_starts, kv_lens, sample_rows)


def _fill(into: np.ndarray, host: Batch | None, count: int, size: int) -> None:
    """Write a batch of `count` decodes and size - count rows of padding (slot -1, length 0) into (7 * size + 1,)."""
    table = into[: 6 * size].reshape(6, size)
    if host is not None:
        fields = (host.tokens, host.positions, host.token_slots, host.slots, host.kv_lens)
        for row, field in enumerate(fields):
            table[row, :count] = field.numpy()
    table[:5, count:] = np.array([[0], [0], [-1], [-1], [0]], dtype=np.int32)
    table[5] = np.arange(size, dtype=np.int32)
    into[6 * size :] = np.arange(size + 1, dtype=np.int32)
