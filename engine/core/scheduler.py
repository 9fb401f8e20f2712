"""The scheduler: takes requests, makes step plans, digests step results. Owns every sequence's state.

It owns no policy (who runs) and no rule of memory (who may); it never sees a token's meaning, a page or a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.core.draft import StepDraft, requeue
from engine.core.errors import ConfigError, InvariantError, RequestError
from engine.core.flight import Flight
from engine.core.growth import GrowthForecast
from engine.core.ledger import KvLedger
from engine.core.load import load_of
from engine.core.plan import Failure, StepPlan, StepResult, Update
from engine.core.policies import Pace, Policy
from engine.core.queues import Queues
from engine.core.record import StepRecord
from engine.core.request import Request
from engine.core.sequence import Sequence, Status

MAX_LONELY_REFUSALS = 3  # memory refusals with nothing else running, after which a request ends with an error
RESTORE_STEPS = 32  # steps without a refusal after which half of the withheld groups are believed in again
MAX_KEPT_RECORDS = 4096

_new = tuple.__new__


class Scheduler:
    """plan() and commit() of steps over a policy and a ledger.

    max_num_seqs: sequences that hold memory (slots) at once. max_model_len: known tokens at which a sequence ends.
    depth: steps in flight at once. ahead=False: a sequence is in one of them only (pipeline stages). ahead=True: a step
    is planned as if the ones before it had succeeded (the executor has their tokens when it needs them); what stops
    late costs one discarded token. forecast: expected growth, if admissions are to leave room for it. pace: told how
    long each step took, from the times that plan() is given.
    Every plan that is not `is_empty` must be submitted; results must be committed in that order.
    """

    draft_class = StepDraft
    sequence_class = Sequence

    def __init__(
        self,
        policy: Policy,
        ledger: KvLedger,
        *,
        max_num_seqs: int,
        max_model_len: int,
        depth: int = 1,
        ahead: bool = False,
        forecast: GrowthForecast | None = None,
        pace: Pace | None = None,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len), ("depth", depth)):
            if value < 1:
                raise ConfigError(f"{name}={value} is below 1")
        ledger.bind(limit_tokens=max_model_len, reserve_context=policy.reserves_context)
        self.policy = policy
        self.ledger = ledger
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.depth = depth
        self.ahead = ahead
        self.forecast = forecast
        self._pace = pace
        self._ended: Flight | None = None  # the step committed last, if somebody still ran then
        self._end_s = 0.0  # when a committed step was last seen to have ended
        self.length_limit = min(max_model_len, ledger.fit_tokens())
        self.queues = Queues()
        self._live: dict[int, Sequence] = {}
        self._by_request: dict[str, Sequence] = {}
        self._flights: deque[Flight] = deque()
        self._batches = 0  # flights with chunks; a plan of releases alone takes no place in the pipeline
        self._releases: list[int] = []  # slots to be given back by the next plan
        self._updates: list[Update] = []  # news that no result brings: aborted, ignored
        self._next_seq = 0
        self._next_step = 0
        self._calm_steps = 0
        self._solo = False  # after a step that refused everyone: one sequence at a time until a step goes well
        self.totals = dict.fromkeys(
            ("steps", "tokens_run", "outputs", "finished", "aborted", "ignored", "failed", "preempted", "refused"), 0
        )
        self.records: deque[StepRecord] = deque(maxlen=MAX_KEPT_RECORDS)

    # ------------------------------------------------------------ requests

    def validate(self, request: Request) -> None:
        """Raise RequestError, naming value and limit, for a request that can never be served whole."""
        if not request.prompt:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt")
        limit = min(self.length_limit - 1, self.policy.prompt_limit)
        if len(request.prompt) > limit:
            why = f"max_model_len={self.max_model_len}"
            if limit == self.policy.prompt_limit:
                why = f"{why}; this policy starts prompts of at most {limit} tokens"
            elif self.length_limit < self.max_model_len:
                why += f", of which the KV pool holds {self.length_limit} for one request"
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens; at most {limit} leave room for an output ({why})",
                "prompt",
            )

    def add(self, request: Request, *, validate: bool = True) -> int:
        """Queue a request. Returns its seq_id. Raises RequestError when it can never fit, or its id is in use.

        validate=False leaves an over-long prompt to the head-of-line check, which ends it with "length".
        """
        if request.request_id in self._by_request:
            raise RequestError("request_id is in use by a live request; use another", "request_id")
        if validate:
            self.validate(request)
        sequence = self.sequence_class(self._next_seq, request, self._length_cap(request))
        self._next_seq += 1
        self._live[sequence.seq_id] = sequence
        self._by_request[request.request_id] = sequence
        self.queues.waiting.append(sequence)
        return sequence.seq_id

    def _length_cap(self, request: Request) -> int:
        """Known tokens at which a request ends."""
        if request.params.max_tokens is None:
            return self.length_limit
        return min(len(request.prompt) + request.params.max_tokens, self.length_limit)

    def abort(self, request_id: str) -> bool:
        """End a request now, wherever it is; the next plan gives its slot back. False when it is not live."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return False
        self._drop(sequence)
        self.totals["aborted"] += 1
        self._updates.append(Update(request_id, (), "abort"))
        return True

    def resize_pool(self, groups: int) -> None:
        """Another size of the pool, as of the next plan. What runs keeps its memory; where it needs more than there is,
        the usual preemption makes room. Requests that could not fit any more are refused by add() from now on.

        Raises ConfigError when a live request could then not finish with the pool to itself.
        """
        self.ledger.resize(groups, max((sequence.length_cap for sequence in self._live.values()), default=1))
        self.length_limit = min(self.max_model_len, self.ledger.fit_tokens())

    def sequence(self, seq_id: int) -> Sequence | None:
        """A live sequence, to be looked at only."""
        return self._live.get(seq_id)

    # ------------------------------------------------------------ steps

    def plan(self, now_s: float) -> StepPlan:
        """The next step. Empty when `depth` steps are in flight or nothing can run now."""
        if self._batches >= self.depth:
            return StepPlan(self._next_step)
        if self._pace is not None and self._ended is not None:
            ended, self._ended = self._ended, None
            # it began when it was planned, or when the step before it ended
            if ended.whole:
                self._pace.observe(load_of(ended.plan.chunks), now_s - max(ended.planned_s, self._end_s))
            self._end_s = now_s
        queues = self.queues
        draft = self.draft_class(
            queues,
            self.ledger,
            now_s=now_s,
            max_num_seqs=1 if self._solo else self.max_num_seqs,
            prompt_limit=self.policy.prompt_limit,
            released=self._releases,
            forecast=self.forecast,
        )
        self.policy.fill(draft)
        plan = draft.freeze(self._next_step)
        self._releases = []
        self.totals["preempted"] += len(plan.preempted)
        for sequence in draft.ignored:
            self._forget(sequence)
            self._updates.append(Update(sequence.request_id, (), "length"))
        self.totals["ignored"] += len(draft.ignored)
        if plan.is_empty:
            if not queues.running:
                self.ledger.restore()  # nothing holds memory, so nothing can be withheld from it
            return plan
        self._next_step += 1  # empty plans take no number
        self._batches += bool(plan.chunks)
        self._flights.append(Flight(plan, draft))
        if self.ahead:
            self._advance(plan)
        return plan

    def _advance(self, plan: StepPlan) -> None:
        """Count the step's results as known before they come. A sequence that they bring to its end waits for them."""
        live, prefilling, decoding = self._live, Status.PREFILLING, Status.DECODING
        for seq_id, _, start, length, samples in plan.chunks:
            sequence = live[seq_id]
            if not samples:
                sequence.computed = start + length
                sequence.status = prefilling
                continue
            sequence.computed = known = sequence.known
            sequence.known = known + 1
            sequence.pending += 1
            if known + 1 < sequence.length_cap:
                sequence.status = decoding

    def commit(self, result: StepResult) -> list[Update]:
        """Digest the result of the oldest submitted plan. Returns the news for clients.

        Results of an older epoch, and of sequences that ended meanwhile, are dropped. Raises InvariantError when the
        result is another step's, or does not answer each sampling chunk exactly once.
        """
        if not self._flights:
            raise InvariantError(f"result of step {result.step_id}, but no step is in flight")
        flight = self._flights[0]
        flight.verify(result)
        self._flights.popleft()
        plan = flight.plan
        self._batches -= bool(plan.chunks)
        updates, self._updates = self._updates, []
        flight.whole = not result.refused
        if result.refused:
            self._take_refusals(plan, result.refused, updates)
        elif plan.chunks:
            self._solo = False
        if result.failed:
            self._take_failures(result.failed, updates)
        for sequence, chunk in () if self.ahead else flight.unsampled:
            if sequence.epoch == chunk.epoch and sequence.status is Status.IN_FLIGHT:
                sequence.computed += chunk.length
                sequence.status = Status.PREFILLING
        before = len(updates)
        ended = self._take_tokens(result, updates)
        sampled = len(updates) - before
        if result.logprobs:
            self._add_logprobs(result, updates, before)
        if ended:
            self._end(ended)
        self._note(flight, result, sampled, len(ended))
        self._ended = flight if plan.chunks and self.queues.running else None
        return updates

    def _take_tokens(self, result: StepResult, updates: list[Update]) -> list[Sequence]:
        """Append sampled tokens to their sequences and news to `updates`. Returns who ended. The hot loop."""
        live = self._live
        ended: list[Sequence] = []
        decoding, ahead = Status.DECODING, self.ahead
        for seq_id, epoch, token in result.tokens:
            sequence = live.get(seq_id)
            if sequence is None or sequence.epoch != epoch:
                continue
            # Sequence.append, written out: a call a token would be a third of the step
            sequence.outputs.append(token)
            if ahead:
                sequence.pending = pending = sequence.pending - 1
                known = sequence.known - pending - 1
            else:
                sequence.computed = known = sequence.known
                sequence.known = known + 1
                sequence.status = decoding
            reason = None
            if known + 1 >= sequence.length_cap or token in sequence.stop_ids:
                reason = sequence.stop_reason(token)
                if reason is not None:
                    ended.append(sequence)
            updates.append(_new(Update, (sequence.request_id, (token,), reason, None, ())))
        return ended

    def _add_logprobs(self, result: StepResult, updates: list[Update], first: int) -> None:
        """Put logprobs into the updates from `first` on, which are those of the result's tokens."""
        found = {}
        for seq_id, epoch, logprobs in result.logprobs:
            sequence = self._live.get(seq_id)
            if sequence is not None and sequence.epoch == epoch:
                found[sequence.request_id] = logprobs
        for index in range(first, len(updates)):
            mine = found.get(updates[index].request_id)
            if mine is not None:
                updates[index] = updates[index]._replace(logprobs=(mine,))

    def drain(self) -> list[Update]:
        """News that no result brings (aborted and ignored requests), for when no step is in flight."""
        updates, self._updates = self._updates, []
        return updates

    def keep_news(self, updates: list[Update]) -> None:
        """Put news back, to be brought by the next commit() or drain()."""
        self._updates.extend(updates)

    def fail_step(self, step_id: int, message: str) -> None:
        """The oldest submitted step was lost (the executor raised): its sequences end with an error.

        Its releases are repeated by the next plan, because nobody knows how far it came; an executor takes the
        release of a sequence that it does not hold for done.
        """
        if not self._flights or self._flights[0].plan.step_id != step_id:
            raise InvariantError(f"step {step_id} is not the one awaited")
        plan = self._flights.popleft().plan
        self._batches -= bool(plan.chunks)
        self._releases.extend(seq_id for seq_id in plan.releases if not self.ledger.holds(seq_id))
        failures = tuple(Failure(chunk.seq_id, chunk.epoch, message) for chunk in plan.chunks)
        news: list[Update] = []
        self._take_failures(failures, news)
        self.keep_news(news)

    # ------------------------------------------------------------ what may go wrong in a step

    def _take_refusals(self, plan: StepPlan, refused: tuple[int, ...], updates: list[Update]) -> None:
        """Preempt whom the executor had no memory for, although the ledger thought there was some.

        The ledger then believes in no more memory than others hold, so whoever was refused waits for them to end
        instead of trying again at once. When nobody is left, it tries again alone, and a few refusals later it ends
        with an error: so neither two sequences nor one can be refused for ever.
        """
        self.totals["refused"] += len(refused)
        epochs = {chunk.seq_id: chunk.epoch for chunk in plan.chunks}
        victims = [s for s in map(self._live.get, refused) if s is not None and s.epoch == epochs[s.seq_id]]
        alone = len(self.queues.running) == 1
        self._calm_steps = 0
        self._solo = self._solo or len(victims) == len(self.queues.running)
        for sequence in sorted(victims, key=lambda s: s.order, reverse=True):
            sequence.refusals += alone
            if sequence.refusals >= MAX_LONELY_REFUSALS:
                tokens, times = sequence.known, sequence.refusals
                self._fail(sequence, f"memory for {tokens} tokens was refused {times} times with nothing else running")
                continue
            self.queues.running.remove(sequence)
            self._give_back(sequence.seq_id)
            if self.forecast is not None:
                self.forecast.lost(sequence.seq_id)
            sequence.restart()
            requeue(self.queues, self.ledger, sequence)
            self.totals["preempted"] += 1
        if victims:
            self.ledger.withhold()
        updates.extend(self.drain())

    def _take_failures(self, failed: Iterable[Failure], updates: list[Update]) -> None:
        """End the sequences whose chunk went wrong."""
        for seq_id, epoch, message in failed:
            sequence = self._live.get(seq_id)
            if sequence is not None and sequence.epoch == epoch:
                self._fail(sequence, message)
        updates.extend(self.drain())

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End one sequence with an error."""
        self._drop(sequence)
        self.totals["failed"] += 1
        self._updates.append(Update(sequence.request_id, (), "error", message))

    # ------------------------------------------------------------ ends

    def _end(self, ended: list[Sequence]) -> None:
        """Sequences that finished in a commit: memory back now, slots with the next plan."""
        for sequence in ended:
            sequence.status = Status.FINISHED
            self._give_back(sequence.seq_id)
            if self.forecast is not None:
                self.forecast.ended(sequence, by_itself=sequence.stop_reason(sequence.outputs[-1]) == "stop")
            self._forget(sequence)
        finished = Status.FINISHED
        self.queues.running = [sequence for sequence in self.queues.running if sequence.status is not finished]
        self.totals["finished"] += len(ended)

    def _drop(self, sequence: Sequence) -> None:
        """Take one live sequence out of everything, in whatever state it is."""
        if sequence.status is Status.WAITING:
            self.queues.waiting.remove(sequence)
        else:
            self.queues.running.remove(sequence)
            self._give_back(sequence.seq_id)
            if self.forecast is not None:
                self.forecast.ended(sequence, by_itself=False)
        sequence.status = Status.FINISHED
        self._forget(sequence)

    def _give_back(self, seq_id: int) -> None:
        """Memory back now, the slot with the next plan."""
        self.ledger.release(seq_id)
        self._releases.append(seq_id)

    def _forget(self, sequence: Sequence) -> None:
        del self._live[sequence.seq_id]
        del self._by_request[sequence.request_id]

    # ------------------------------------------------------------ numbers

    @property
    def has_work(self) -> bool:
        """Whether another step would do or tell anything: sequences, results, releases or news."""
        return bool(self._live or self._flights or self._releases or self._updates)

    @property
    def num_in_flight(self) -> int:
        """Submitted plans whose results are awaited."""
        return len(self._flights)

    def _note(self, flight: Flight, result: StepResult, sampled: int, finished: int) -> None:
        """Write the step's record and add it to the totals."""
        self.records.append(flight.record(result, sampled, finished))
        ledger, totals = self.ledger, self.totals
        totals["steps"] += 1
        totals["tokens_run"] += flight.num_tokens
        totals["outputs"] += sampled
        if not result.refused and ledger.withheld_groups:
            self._calm_steps += 1
            if self._calm_steps >= RESTORE_STEPS:
                self._calm_steps = 0
                ledger.restore(-(-ledger.withheld_groups // 2))

    def stats(self) -> dict[str, int]:
        """Counts now (sequences, groups) and totals since the start (`*_total`)."""
        ledger = self.ledger
        now = {
            "running": len(self.queues.running),
            "waiting": len(self.queues.waiting),
            "in_flight": len(self._flights),
            "ledger_groups_total": ledger.total_groups,
            "ledger_groups_free": ledger.free_groups,
            "ledger_groups_reserved": ledger.reserved_groups,
            "ledger_groups_withheld": ledger.withheld_groups,
        }
        if self.forecast is not None:
            now |= self.forecast.stats()
            now["over_commit_groups"] = max(0, now["expected_growth_groups"] - ledger.free_groups)
        return now | {f"{name}_total": count for name, count in self.totals.items()}

    def check(self) -> None:
        """Raise InvariantError unless everything we promise about our own state holds. Idle, and in tests."""
        running, waiting = self.queues.running, list(self.queues.waiting)
        ids = [sequence.seq_id for sequence in (*running, *waiting)]
        if len(ids) != len(self.queues.waiting) + len(running) or sorted(ids) != sorted(self._live):
            raise InvariantError(f"queues hold {sorted(ids)}, live are {sorted(self._live)}")
        if len(running) > self.max_num_seqs:
            raise InvariantError(f"{len(running)} sequences run, at most {self.max_num_seqs} may")
        for sequence in waiting:
            if sequence.status is not Status.WAITING or sequence.computed:
                raise InvariantError(f"{sequence!r} waits")
        if self.queues.waiting.tokens != sum(sequence.left for sequence in waiting):
            raise InvariantError(f"{self.queues.waiting.tokens} tokens are said to wait")
        for sequence in running:
            if sequence.status in (Status.WAITING, Status.FINISHED):
                raise InvariantError(f"{sequence!r} runs")
            if sequence.known != len(sequence.request.prompt) + len(sequence.outputs) + sequence.pending:
                raise InvariantError(f"{sequence!r} has {len(sequence.outputs)} outputs")
        in_flight = {(chunk.seq_id, chunk.epoch) for flight in self._flights for chunk in flight.plan.chunks}
        for sequence in () if self.ahead else running:
            if (sequence.status is Status.IN_FLIGHT) != ((sequence.seq_id, sequence.epoch) in in_flight):
                raise InvariantError(f"{sequence!r} is in flight: {(sequence.seq_id, sequence.epoch) in in_flight}")
        if self.forecast is not None:
            self.forecast.check([sequence.seq_id for sequence in running])
        self.ledger.check({s.seq_id: s.computed if s.status is Status.DECODING else s.goal for s in running})
