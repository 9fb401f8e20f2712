"""Runs one step plan: memory, batch, model, sampler.

It keeps each sequence's tokens (they travel once per epoch) and nothing of queues, budgets or policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.core.plan import Admission, Chunk, Failure, SampledToken, StepPlan, StepResult
from engine.kv.store import KvStore
from engine.models import Model
from engine.runner.batch import Row, pack
from engine.runner.sampler import Pick, Sampler


@dataclass(slots=True)
class _Sequence:
    """What the runner knows of a sequence. tokens: known ones; num_prompt: how many are not outputs."""

    admission: Admission
    tokens: list[int]
    num_prompt: int


class Runner:
    """One model on one device. step: release, map, run, sample; a refused sequence is left out."""

    def __init__(self, model: Model, store: KvStore, sampler: Sampler) -> None:
        self.model, self.store, self.sampler = model, store, sampler
        self._sequences: dict[int, _Sequence] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan to its sampled tokens."""
        refused = self.store.apply(plan)
        for seq_id in plan.releases:
            self._sequences.pop(seq_id, None)
        for admission in plan.admissions:
            known = list(admission.tokens)
            self._sequences[admission.seq_id] = _Sequence(admission, known, len(known) - admission.num_outputs)
        for seq_id in refused:
            del self._sequences[seq_id]
        chunks = [chunk for chunk in plan.chunks if chunk.seq_id not in refused]
        if not chunks:
            return StepResult(plan.step_id, refused=tuple(refused))
        picked = self._forward(plan, chunks)
        return StepResult(
            plan.step_id,
            tokens=tuple(SampledToken(c.seq_id, c.epoch, token) for c, token in picked if token >= 0),
            refused=tuple(refused),
            failed=tuple(Failure(c.seq_id, c.epoch, "its logits are not finite") for c, token in picked if token < 0),
        )

    def _forward(self, plan: StepPlan, chunks: list[Chunk]) -> list[tuple[Chunk, int]]:
        """Model and sampler over the chunks that have memory. Returns the sampling chunks and their tokens."""
        rows = []
        for chunk in chunks:
            known = self._sequences[chunk.seq_id].tokens
            slot = self.store.slot_of(chunk.seq_id)
            rows.append(Row(slot, chunk.start, known[chunk.start : chunk.end], chunk.samples))
        self.store.look_ahead(plan)
        sampling = [chunk for chunk in chunks if chunk.samples]
        logits = self.model(pack(rows))  # (R, V)
        tokens = self.sampler(logits, [self._pick(chunk.seq_id) for chunk in sampling]) if sampling else []
        for chunk, token in zip(sampling, tokens, strict=True):
            self._sequences[chunk.seq_id].tokens.append(token)
        return list(zip(sampling, tokens, strict=True))

    def _pick(self, seq_id: int) -> Pick:
        """How this sequence's next token is to be chosen."""
        sequence = self._sequences[seq_id]
        admission = sequence.admission
        return Pick(admission.params, len(sequence.tokens) - sequence.num_prompt, admission.stop_ids)

    def close(self) -> None:
        """Forget every sequence and give the memory back."""
        self._sequences.clear()
        self.store.close()
