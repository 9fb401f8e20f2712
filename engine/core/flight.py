"""A submitted plan whose result is awaited: what was true when it was made, and whether a result answers it.

It knows no queue and changes nothing; the scheduler digests the result.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.errors import InvariantError
from engine.core.plan import StepPlan, StepResult
from engine.core.record import StepRecord


class Flight:
    """plan, and the counts of its draft (see StepRecord); unsampled: its prefill chunks without an answer. whole: all
    of it ran, so that its time says something."""

    __slots__ = (
        "plan",
        "planned_s",
        "prefill_tokens",
        "prefills",
        "reserved_groups",
        "running",
        "total_groups",
        "unsampled",
        "waiting",
        "whole",
    )

    def __init__(self, plan: StepPlan, draft: StepDraft) -> None:
        self.plan = plan
        self.planned_s = draft.now_s
        self.whole = True
        self.unsampled = draft.unsampled
        self.prefills = draft.num_prefills
        self.prefill_tokens = draft.num_tokens - (draft.num_chunks - draft.num_prefills)
        self.running = len(draft.queues.running)
        self.waiting = len(draft.queues.waiting)
        self.reserved_groups = draft.ledger.reserved_groups
        self.total_groups = draft.ledger.total_groups

    @property
    def num_tokens(self) -> int:
        """Tokens run by the step."""
        return self.prefill_tokens + len(self.plan.chunks) - self.prefills

    def verify(self, result: StepResult) -> None:
        """Raise InvariantError unless the result answers this plan."""
        plan = self.plan
        if plan.step_id != result.step_id:
            raise InvariantError(f"result of step {result.step_id}, step {plan.step_id} is awaited")
        answers = len(result.tokens)
        if result.refused or result.failed:
            samples = {chunk.seq_id: chunk.samples for chunk in plan.chunks}
            lost = {*result.refused, *(failure.seq_id for failure in result.failed)}
            if not lost <= samples.keys():
                raise InvariantError(f"step {plan.step_id} answers for sequences that are not in it")
            answers += sum(samples[seq_id] for seq_id in lost)
        sampling = len(plan.chunks) - len(self.unsampled)
        if answers != sampling:
            raise InvariantError(f"step {plan.step_id} has {sampling} sampling chunks and {answers} answers")

    def record(self, result: StepResult, sampled: int, finished: int) -> StepRecord:
        """The step in numbers, once its result was digested: tokens kept, and sequences that ended."""
        plan = self.plan
        return StepRecord(
            plan.step_id,
            self.planned_s,
            self.prefills,
            self.prefill_tokens,
            len(plan.chunks) - self.prefills,
            self.running,
            self.waiting,
            len(plan.preempted),
            len(plan.ignored),
            self.reserved_groups,
            self.total_groups,
            sampled,
            len(result.tokens) - sampled,
            len(result.refused),
            finished,
        )
