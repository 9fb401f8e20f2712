"""One sequence: how many of its tokens are known, how many are computed, and when it has to stop.

It deliberately knows nothing of queues, budgets or memory; it keeps the count of tokens its reserved memory covers
for the ledger, because asking the ledger once per token would be the slowest part of a step.
"""

from __future__ import annotations

from array import array
from enum import Enum

from engine.core.request import Request


class Status(Enum):
    """Where a sequence is.

    WAITING -> IN_FLIGHT -> PREFILLING | DECODING -> IN_FLIGHT -> ... -> FINISHED; preemption leads back to WAITING
    from anywhere between. IN_FLIGHT: a submitted step holds it, policies skip it.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    IN_FLIGHT = "in flight"
    FINISHED = "finished"


class Sequence:
    """The state machine of one request.

    known: tokens we have or, planning ahead, will have when the steps in flight are done; `pending` of them are still
    to come. computed: tokens whose KV is written. goal: tokens to prefill in this
    epoch, i.e. known at its start. epoch: restarts so far. length_cap: known tokens at which it must end ("length").
    covered: known tokens that the reserved memory holds. whole: memory up to length_cap is reserved, so it is never
    a victim. preemptions, refusals: for the progress rule. put_off: its first token may come late, so that others come
    in time. order: (priority, arrival), the order of running.
    """

    __slots__ = (
        "arrival_s",
        "computed",
        "covered",
        "epoch",
        "goal",
        "known",
        "length_cap",
        "order",
        "outputs",
        "pending",
        "preemptions",
        "put_off",
        "refusals",
        "request",
        "request_id",
        "seq_id",
        "status",
        "stop_ids",
        "whole",
    )

    def __init__(self, seq_id: int, request: Request, length_cap: int) -> None:
        self.seq_id = seq_id
        self.request = request
        self.request_id = request.request_id
        self.arrival_s = request.arrival_s
        self.order = (request.priority, request.arrival_s)
        self.stop_ids = request.stop_ids
        self.length_cap = length_cap
        self.outputs = array("q")  # not a list: the garbage collector would walk every token of every sequence
        self.status = Status.WAITING
        self.known = len(request.prompt)
        self.goal = self.known
        self.pending = 0
        self.computed = 0
        self.covered = 0
        self.epoch = 0
        self.whole = False
        self.preemptions = 0
        self.refusals = 0
        self.put_off = False

    @property
    def left(self) -> int:
        """Tokens still to prefill in this epoch; 0 while decoding."""
        return self.goal - self.computed if self.computed < self.goal else 0

    def tokens(self) -> tuple[int, ...]:
        """Every known token id: the prompt, then the outputs."""
        return self.request.prompt + tuple(self.outputs) if self.outputs else self.request.prompt

    def restart(self) -> None:
        """Back to waiting, to recompute everything known. Outputs stay, so `max_tokens` counts on; what is pending
        is forgotten, and comes out again."""
        self.status = Status.WAITING
        self.known -= self.pending
        self.pending = 0
        self.epoch += 1
        self.preemptions += 1
        self.computed = 0
        self.covered = 0
        self.goal = self.known
        self.whole = False

    def append(self, token: int) -> str | None:
        """Take a sampled token; everything known before it is computed now. Returns the finish reason, or None."""
        self.outputs.append(token)
        self.computed = self.known
        self.known += 1
        return self.stop_reason(token)

    def stop_reason(self, token: int) -> str | None:
        """Why the sequence ends with `token`, the newest one that came: "stop", "length", or None.

        A stop id counts only once min_tokens outputs came before it. The cap is max_tokens or the model's length,
        whichever comes first; it is enforced while decoding, too.
        """
        if token in self.stop_ids and len(self.outputs) > self.request.params.min_tokens:
            return "stop"
        return "length" if self.known - self.pending >= self.length_cap else None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.name}, computed={self.computed}, known={self.known}, "
            f"epoch={self.epoch})"
        )
