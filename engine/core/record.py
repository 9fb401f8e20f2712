"""What one step did, in numbers: the only source of step metrics. Prometheus, CSV and traces are sinks of it.

It knows no request and no token; times are the scheduler's `now_s`, given by whoever drives it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One submitted step, as of its plan; the last four fields as of its commit.

    planned_s: monotonic seconds of the plan. prefill_tokens, decode_tokens: tokens run. running, waiting: sequences
    after the plan. preempted, ignored: by this plan. reserved_groups: of total_groups, by the ledger.
    sampled: tokens kept; dropped: tokens of an older epoch or an aborted sequence; refused: chunks without memory;
    finished: sequences that ended with this step.
    """

    step_id: int
    planned_s: float
    prefill_chunks: int
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    preempted: int
    ignored: int
    reserved_groups: int
    total_groups: int
    sampled: int = 0
    dropped: int = 0
    refused: int = 0
    finished: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens run by the step."""
        return self.prefill_tokens + self.decode_tokens
