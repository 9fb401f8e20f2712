"""Stall-free batching: every decode runs, prompts fill what is left of the step's token budget in chunks.

Source: Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (OSDI 2024), section 4.
"""

from __future__ import annotations

from engine.core.draft import StepDraft
from engine.core.errors import ConfigError
from engine.core.load import Load
from engine.core.policies import DEFAULT_CHUNK_TOKENS, Pace, PolicyOptions, policies
from engine.core.policies._deadline import Deadline
from engine.core.policies._order import PromptOrder, Shortest
from engine.core.sequence import Sequence, Status

CONSIDERED = 512  # of those who wait, in line: what looking at all of thousands takes would be missed in every step


@policies.register("sarathi")
class Sarathi:
    """The default. See the module; `schedule` replaces the fixed chunk by one that shrinks with progress, `pace` by one
    that keeps steps with decodes as short as asked."""

    reserves_context = False

    def __init__(self, options: PolicyOptions) -> None:
        self.prompt_limit = options.max_model_len
        self.schedule, self.pace = options.schedule, options.pace
        self.order = _prompt_order(options)
        if self.pace is not None and self.schedule is not None:
            raise ConfigError("a chunk schedule and a pace contradict each other; give one")
        if self.order is not None and self.schedule is not None:
            raise ConfigError("a chunk schedule takes prompts as they arrive; leave the schedule or the order out")
        self.chunk_tokens = options.chunk_tokens or DEFAULT_CHUNK_TOKENS
        if self.schedule is not None:
            self.chunk_tokens = self.schedule.high_tokens
        self._per_step = self.schedule is not None and self.schedule.budget == "step"

    def fill(self, draft: StepDraft) -> None:
        """Decodes, then prompts in progress, then as many new prompts as budget, slots and memory take."""
        draft.budget_tokens = self.chunk_tokens
        draft.sort_running()
        partial = draft.decode()
        if self.order is not None:
            self._fill_in_order(draft, partial, self.order)
            return
        reach = self.chunk_tokens
        if self.pace is not None:
            reach = self._reach(draft, draft.load(), self.pace, partial, partial)
        starved = False
        bound = self.chunk_tokens
        for sequence in partial:
            size = self._size(sequence, reach)
            bound = min(bound, size) if self._per_step else size
            starved = starved or bound < draft.num_tokens
            draft.prefill(sequence, min(sequence.left, bound - draft.num_tokens))
        if starved:  # decodes alone are beyond a late prompt's size: let them drain before they become more
            return
        while (waiting := draft.next_waiting()) is not None:
            size = self._size(waiting, reach)
            bound = min(bound, size) if self._per_step else size
            if not draft.admit(waiting, min(waiting.left, bound - draft.num_tokens)):
                return

    def _fill_in_order(self, draft: StepDraft, partial: list[Sequence], order: PromptOrder) -> None:
        """The step's tokens go to prompts, new or in progress, in this order."""
        prompts, room_tokens = [*partial, *draft.arrived(CONSIDERED)], self.chunk_tokens - draft.num_tokens
        if self.pace is None:
            prompts, reach = order.line(prompts, draft.now_s, None, room_tokens), self.chunk_tokens
        else:
            decodes = draft.load()
            cost = self.pace.prompt_cost(decodes, self.chunk_tokens)
            prompts = order.line(prompts, draft.now_s, cost, room_tokens)
            reach = self._reach(draft, decodes, self.pace, partial, prompts)
        for sequence in partial:
            draft.keep(sequence)
        full = False
        for sequence in prompts:
            share = min(sequence.left, reach - draft.num_tokens)
            if share <= 0:
                return
            if sequence.status is Status.PREFILLING:
                draft.go_on(sequence, share)
            elif not full:  # nobody passes one who is refused, but those in progress go on
                full = not draft.admit(sequence, share)
                if not full and not sequence.epoch:
                    order.started()

    def _reach(
        self, draft: StepDraft, decodes: Load, pace: Pace, partial: list[Sequence], prompts: list[Sequence]
    ) -> int:
        """Tokens of this step at most, its decodes being in. Without decodes nobody waits for it to be short. prompts:
        as they are to be run, the first of them at least, if it is in progress."""
        if not draft.num_tokens:
            return self.chunk_tokens
        backlog = sum(sequence.left for sequence in partial) + draft.queues.waiting.tokens
        context = prompts[0].computed if prompts else 0
        return pace.reach(decodes, context, backlog, self.chunk_tokens)

    def _size(self, sequence: Sequence, reach: int) -> int:
        """Tokens that a step may reach while it runs this prompt."""
        return reach if self.schedule is None else self.schedule.chunk_tokens(sequence.computed)


def _prompt_order(options: PolicyOptions) -> PromptOrder | None:
    """None: as they arrive."""
    if options.prompt_order != "deadline":
        return Shortest() if options.prompt_order == "shortest" else None
    if options.ttft_target_s is None or options.pace is None:
        raise ConfigError("prompt order deadline needs a TTFT target, and a pace, which knows how fast prompts run")
    return Deadline(options.ttft_target_s)
