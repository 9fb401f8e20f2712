"""Runs step plans: memory, batch, model, sampler. launch() starts a step, collect() brings its tokens.

It keeps each sequence's tokens (they travel once per epoch) and nothing of queues, budgets or policies. On a GPU a
step may be launched before the tokens of the one before it are known here: the newest token of every slot stays on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.core.plan import (
    Admission,
    Chunk,
    Failure,
    SampledLogprobs,
    SampledToken,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from engine.kv.store import KvStore
from engine.models import Model
from engine.runner.batch import Batch, Row, pack
from engine.runner.device_sampler import DeviceSampler
from engine.runner.graphs import DecodeGraphs
from engine.runner.newest import NewestTokens
from engine.runner.pieces import PieceGraphs
from engine.runner.sampler import Pick, RawRows, Sampler
from engine.scx.errors import WorkerLost
from engine.scx.sessions import Sessions


@dataclass(slots=True)
class _Sequence:
    """What the runner knows of a sequence. tokens: known here; num_prompt: how many are not outputs; computed: tokens
    whose KV is written once the steps launched so far are done."""

    admission: Admission
    tokens: list[int]
    num_prompt: int
    computed: int = 0


@dataclass(slots=True)
class Launched:
    """A step under way, until `done` (None: at once) has happened. picked: (R,) ids in host memory, whole then.
    watched: the rows of picked that want logprobs; top: their (ids, values) as RawRows.logprobs gives them."""

    step_id: int
    sampling: list[Chunk]
    refused: tuple[int, ...]
    failed: tuple[Failure, ...] = ()
    picked: torch.Tensor | None = None
    done: torch.cuda.Event | None = None
    watched: Sequence[int] = ()
    top: tuple[torch.Tensor, torch.Tensor] | None = None


def _failures(chunks: list[Chunk]) -> tuple[Failure, ...]:
    """What is said of sequences whose keys were lost."""
    return tuple(Failure(chunk.seq_id, chunk.epoch, "the secure worker was lost; try again") for chunk in chunks)


class Runner:
    """One model on one device. A chunk whose sequence has no memory, or does not follow the one before, is refused."""

    def __init__(
        self,
        model: Model,
        store: KvStore,
        sampler: Sampler | DeviceSampler,
        device: torch.device = torch.device("cpu"),  # noqa: B008  a constant
        *,
        replayable: bool = False,
        scx: Sessions | None = None,
    ) -> None:
        """replayable: whether a CUDA graph may hold this model's decodes (Caps.graphs)."""
        self.model, self.store, self.sampler, self.device = model, store, sampler, device
        self.replayable = replayable
        self.newest = NewestTokens(store.geometry.slots, device)
        self.graphs: DecodeGraphs | None = None
        self.pieces: PieceGraphs | None = None
        self.scx = scx
        self._sequences: dict[int, _Sequence] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """launch() and collect()."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Apply the plan's memory and start its work; waits for nothing on the device."""
        refused = set(self.store.apply(plan))
        if self.scx is not None:
            self.scx.follow(plan, refused, self.store.slot_of)
        for seq_id in plan.releases:
            self._sequences.pop(seq_id, None)
        for admission in plan.admissions:
            known = list(admission.tokens)
            self._sequences[admission.seq_id] = _Sequence(admission, known, len(known) - admission.num_outputs)
        for seq_id in refused:
            self._sequences.pop(seq_id, None)
        chunks: list[Chunk] = []
        for chunk in plan.chunks:
            sequence = self._sequences.get(chunk.seq_id)
            follows = sequence is not None and sequence.admission.epoch == chunk.epoch
            if sequence is None or not follows or sequence.computed != chunk.start:
                refused.add(chunk.seq_id)
                continue
            sequence.computed = chunk.end
            chunks.append(chunk)
        lost = [] if self.scx is None else [chunk for chunk in chunks if self.scx.lost(chunk.seq_id)]
        chunks = [chunk for chunk in chunks if chunk not in lost] if lost else chunks
        launched = Launched(plan.step_id, [chunk for chunk in chunks if chunk.samples], tuple(refused), _failures(lost))
        if chunks:
            self._forward(plan, chunks, launched)
        return launched

    def _forward(self, plan: StepPlan, chunks: list[Chunk], launched: Launched) -> None:
        """Model and sampler over the chunks that have memory."""
        rows = []
        for chunk in chunks:
            known = self._sequences[chunk.seq_id].tokens
            slot = self.store.slot_of(chunk.seq_id)
            tokens = known[chunk.start : chunk.end] if chunk.start < len(known) else (-1,)
            rows.append(Row(slot, chunk.start, tokens, chunk.samples))
        picks = [self._pick(chunk) for chunk in launched.sampling]
        host = pack(rows)
        on_cpu = self.device.type == "cpu"
        if on_cpu:  # nothing runs behind our back here: pages for the next step are mapped while this one computes
            self.store.look_ahead(plan)
        try:
            picked = self._sample(host, picks, launched)
        except WorkerLost:  # nothing of the step may be used, and nothing is made up for it in plaintext
            launched.sampling, launched.failed, picked = [], launched.failed + _failures(chunks), None
        if on_cpu:
            launched.picked = picked
            return
        self.store.fence()
        self.store.look_ahead(plan)
        if picked is not None:
            launched.picked = _to_host(picked)
            if launched.top is not None:
                launched.top = (_to_host(launched.top[0]), _to_host(launched.top[1]))
        launched.done = torch.cuda.Event()  # a step that samples nothing is waited for, too: no more than depth run
        launched.done.record()

    def _sample(self, host: Batch, picks: list[Pick], launched: Launched) -> torch.Tensor | None:
        """(R,) ids on the device, noted as the newest of their slots; None when nothing is sampled. Logprobs that are
        wanted go into `launched`."""
        if self.graphs is not None and self.graphs.fits(host, picks):
            if self.scx is not None:
                self.scx.claim(host)
            picked = self.graphs(host, picks)
            if self.scx is not None:
                self.scx.seal(host)
            return picked
        batch = self.widened(host).to(self.device)
        batch.tokens = self.newest.resolve(batch)
        batch = self.store.place(batch)
        pieces = self.pieces if self.pieces is not None and self.pieces.fits(batch) else None
        if pieces is not None and self.scx is not None:
            self.scx.claim(batch)
        logits = self.model(batch) if pieces is None else pieces(batch)
        if not picks:
            return None
        logits = logits[: len(picks)]  # (R, V)
        raw = RawRows(logits, picks) if any(pick.params.logprobs is not None for pick in picks) else None
        picked = self.sampler(logits, picks)
        if raw is not None:
            launched.watched, launched.top = raw.rows, raw.logprobs(picked)
        self.newest.note(batch, picked)
        return picked

    def widened(self, host: Batch) -> Batch:
        """With as many rows for the head as a recorded step has: the library loads a kernel anew for every eight rows
        more, and the whole GPU waits tens of milliseconds for the first use of each."""
        rows = host.sample_rows.shape[0]
        return host if self.graphs is None or not rows else host.widened(self.graphs.room(rows))

    def _pick(self, chunk: Chunk) -> Pick:
        """How the token behind a sampling chunk is to be chosen."""
        sequence = self._sequences[chunk.seq_id]
        admission = sequence.admission
        return Pick(admission.params, chunk.end - sequence.num_prompt, admission.stop_ids)

    def collect(self, launched: Launched) -> StepResult:
        """The result of a launched step; waits for it. Call in the order of the launches."""
        if launched.done is not None:
            launched.done.synchronize()
        tokens: list[int] = [] if launched.picked is None else launched.picked.tolist()
        good, failed = [], list(launched.failed)
        for chunk, token in zip(launched.sampling, tokens, strict=True):
            if token < 0:
                failed.append(Failure(chunk.seq_id, chunk.epoch, "its logits are not finite"))
                continue
            good.append(SampledToken(chunk.seq_id, chunk.epoch, token))
            sequence = self._sequences.get(chunk.seq_id)
            if sequence is not None and sequence.admission.epoch == chunk.epoch:
                sequence.tokens.append(token)
        return StepResult(launched.step_id, tuple(good), launched.refused, tuple(failed), _logprobs_of(launched))

    def close(self) -> None:
        """Forget every sequence and give the memory back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._sequences.clear()
        if self.scx is not None:
            self.scx.shut()
        self.store.close()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on its way to pinned memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _logprobs_of(launched: Launched) -> tuple[SampledLogprobs, ...]:
    """The logprobs of a step that is done; () in most steps."""
    if launched.top is None:
        return ()
    found = []
    for row, ids, values in zip(launched.watched, launched.top[0].tolist(), launched.top[1].tolist(), strict=True):
        chunk = launched.sampling[row]
        count = 1 + sum(token >= 0 for token in ids[1:])
        told = TokenLogprobs(tuple(ids[:count]), tuple(values[:count]))
        found.append(SampledLogprobs(chunk.seq_id, chunk.epoch, told))
    return tuple(found)
