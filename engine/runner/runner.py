"""Runs step plans: memory, batch, model, sampler. launch() starts a step, collect() brings its tokens.

It keeps each sequence's tokens (they travel once per epoch) and nothing of queues, budgets or policies. On a GPU a
step may be launched before the tokens of the one before it are known here: the newest token of every slot stays on the
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.core.plan import Admission, Chunk, Failure, SampledToken, StepPlan, StepResult
from engine.kv.store import KvStore
from engine.models import Model
from engine.runner.batch import Batch, Row, pack
from engine.runner.graphs import DecodeGraphs
from engine.runner.newest import NewestTokens
from engine.runner.sampler import Pick, Sampler
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
    """A step under way. picked: (R,) ids in host memory, whole once `done` (None: at once) has happened."""

    step_id: int
    sampling: list[Chunk]
    refused: tuple[int, ...]
    failed: tuple[Failure, ...] = ()
    picked: torch.Tensor | None = None
    done: torch.cuda.Event | None = None


def _failures(chunks: list[Chunk]) -> tuple[Failure, ...]:
    """What is said of sequences whose keys were lost."""
    return tuple(Failure(chunk.seq_id, chunk.epoch, "the secure worker was lost; try again") for chunk in chunks)


class Runner:
    """One model on one device. A chunk whose sequence has no memory, or does not follow the one before, is refused."""

    def __init__(
        self,
        model: Model,
        store: KvStore,
        sampler: Sampler,
        device: torch.device = torch.device("cpu"),  # noqa: B008  a constant
        scx: Sessions | None = None,
    ) -> None:
        self.model, self.store, self.sampler, self.device = model, store, sampler, device
        self.newest = NewestTokens(store.geometry.slots, device)
        self.graphs: DecodeGraphs | None = None
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
            picked = self._sample(host, picks)
        except WorkerLost:  # nothing of the step may be used, and nothing is made up for it in plaintext
            launched.sampling, launched.failed, picked = [], launched.failed + _failures(chunks), None
        if on_cpu:
            launched.picked = picked
            return
        self.store.fence()
        self.store.look_ahead(plan)
        if picked is not None:
            launched.picked = torch.empty(picked.shape[0], dtype=torch.int64, pin_memory=True)
            launched.picked.copy_(picked, non_blocking=True)
            launched.done = torch.cuda.Event()
            launched.done.record()

    def _sample(self, host: Batch, picks: list[Pick]) -> torch.Tensor | None:
        """(R,) ids on the device, noted as the newest of their slots; None when nothing is sampled."""
        if self.graphs is not None and self.graphs.fits(host) and all(pick.greedy for pick in picks):
            return self.graphs(host)
        batch = host.to(self.device)
        batch.tokens = self.newest.resolve(batch)
        logits = self.model(batch)  # (R, V)
        if not picks:
            return None
        picked = self.sampler(logits, picks)
        self.newest.note(batch, picked)
        return picked

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
        return StepResult(launched.step_id, tuple(good), launched.refused, tuple(failed))

    def close(self) -> None:
        """Forget every sequence and give the memory back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._sequences.clear()
        if self.scx is not None:
            self.scx.shut()
        self.store.close()
