"""One step being made: policies propose, the draft refuses.

It enforces what no policy may get wrong (memory, slots, budget, arrival, length, preemption and its bookkeeping) and
knows no policy: the order of its verbs is all a policy decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from engine.core.errors import InvariantError, Refusal
from engine.core.growth import GrowthForecast
from engine.core.ledger import KvLedger
from engine.core.load import Load, load_of
from engine.core.plan import Admission, Chunk, StepPlan
from engine.core.queues import Queues
from engine.core.sequence import Sequence, Status

_new = tuple.__new__  # makes a NamedTuple in half the time its own constructor takes


class StepDraft:
    """The mutable builder of one StepPlan.

    now_s: only what arrived by then may start. max_num_seqs: sequences that hold memory at once. prompt_limit:
    longest prompt [tokens] the head of the line may have. released: seq_ids whose slots this plan gives back.
    forecast: what running sequences will still need, which an admission leaves free.
    """

    def __init__(
        self,
        queues: Queues,
        ledger: KvLedger,
        *,
        now_s: float,
        max_num_seqs: int,
        prompt_limit: int,
        released: Iterable[int] = (),
        forecast: GrowthForecast | None = None,
    ) -> None:
        self.queues = queues
        self.ledger = ledger
        self.forecast = forecast
        self.now_s = now_s
        self.max_num_seqs = max_num_seqs
        self.prompt_limit = prompt_limit
        self.budget_tokens: int | None = None
        self.num_tokens = 0
        self.kept: list[Sequence] = []  # running after this step, beside what `running` still holds
        self.ignored: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.releases: list[int] = list(released)
        self.unsampled: list[tuple[Sequence, Chunk]] = []  # prefill chunks out of which no token comes
        self.running = queues.running  # not yet visited by the policy
        self._released = set(self.releases)
        self._prefills: list[Chunk] = []
        self._decodes: list[Chunk] = []
        self._admissions: list[Admission] = []
        self._in_order = True

    # ------------------------------------------------------------ what a policy asks

    @property
    def num_chunks(self) -> int:
        """Chunks proposed so far."""
        return len(self._prefills) + len(self._decodes)

    @property
    def num_prefills(self) -> int:
        """Prefill chunks proposed so far."""
        return len(self._prefills)

    def load(self) -> Load:
        """What the chunks proposed so far have to do."""
        return load_of([*self._prefills, *self._decodes])

    def sort_running(self) -> None:
        """Order what runs by priority and arrival; a policy that wants it asks for it first."""
        self.queues.sort_running()

    def next_waiting(self) -> Sequence | None:
        """Who may be admitted next, or None. Over-long heads of the line are taken out on the way (ignored)."""
        waiting = self.queues.waiting
        while (sequence := waiting.head(self.now_s)) is not None:
            if not self.over_long(sequence):
                return sequence
            waiting.remove(sequence)
            sequence.status = Status.FINISHED
            self.ignored.append(sequence)
        return None

    def arrived(self, most: int) -> list[Sequence]:
        """Who of the first `most` in line has arrived; the over-long ones are taken out (ignored)."""
        found = []
        for sequence in [one for one in islice(self.queues.waiting, most) if one.arrival_s <= self.now_s]:
            if self.over_long(sequence):
                self.queues.waiting.remove(sequence)
                sequence.status = Status.FINISHED
                self.ignored.append(sequence)
            else:
                found.append(sequence)
        return found

    def over_long(self, sequence: Sequence) -> bool:
        """Whether the head of the line is too long ever to start."""
        if sequence.epoch and not self.ledger.rule.ignore_restarted:
            return False
        return sequence.known > self.prompt_limit

    # ------------------------------------------------------------ what a policy proposes

    def decode(self, *, grows: bool = True, keep_prefilling: bool = False) -> list[Sequence]:
        """One token for every decoding sequence, in order; a sequence in flight is passed over.

        Where memory lacks, the last one not yet visited is preempted, and at last the sequence itself.
        grows=False: everything running has reserved its end (orca, faster_transformer), so nothing is asked for.
        Returns the sequences in mid-prefill, for the policy to `prefill` or `keep`; keep_prefilling keeps them here.
        """
        running, kept, chunks = self.running, self.kept, self._decodes
        partial: list[Sequence] = []
        asks_always = grows and not self.ledger.rule.append_only_when_needed
        decoding, prefilling, in_flight = Status.DECODING, Status.PREFILLING, Status.IN_FLIGHT
        before = len(chunks)
        for sequence in running:  # victims leave from the unvisited end while this walks
            status = sequence.status
            if status is decoding:
                known = sequence.known
                if (asks_always or (known > sequence.covered and grows)) and not self._append(sequence):
                    continue
                sequence.status = in_flight
                chunks.append(_new(Chunk, (sequence.seq_id, sequence.epoch, known - 1, 1, True)))
                kept.append(sequence)
            elif status is prefilling and not keep_prefilling:
                partial.append(sequence)
            else:
                kept.append(sequence)
        self.num_tokens += len(chunks) - before
        self.running = []
        return partial

    def visit(self) -> list[Sequence]:
        """Everything running and not yet visited, in order; the policy must `prefill` or `keep` each."""
        running, self.running = self.running, []
        return running

    def keep(self, sequence: Sequence) -> None:
        """A running sequence does nothing in this step."""
        kept = self.kept
        if kept and sequence.order < kept[-1].order:
            self._in_order = False
        kept.append(sequence)

    def prefill(self, sequence: Sequence, tokens: int) -> bool | Refusal:
        """Continue a sequence in mid-prefill by `tokens`; it is kept either way. tokens <= 0 is refused."""
        self.keep(sequence)
        return self.go_on(sequence, tokens)

    def go_on(self, sequence: Sequence, tokens: int) -> bool | Refusal:
        """As prefill, for a sequence that was kept already."""
        refusal = self._over_budget(tokens)
        if refusal is not None:
            return refusal
        self._chunk(sequence, tokens)
        return True

    def admit(self, sequence: Sequence, tokens: int) -> bool | Refusal:
        """Start the head of the line with its first `tokens` tokens; memory for everything known is reserved now."""
        if sequence.seq_id in self._released:
            return Refusal("preempted")  # its slot is given back by this very plan
        running = len(self.running) + len(self.kept)
        if running >= self.max_num_seqs:
            return Refusal("slots", 1, 0)
        refusal = self._over_budget(tokens)  # falsy itself, so no `or` here
        if refusal is None:
            refusal = self._no_memory(sequence)
        if refusal is not None:
            return refusal
        ledger = self.ledger
        cap = ledger.rule.preemption_cap
        sequence.whole = cap is not None and sequence.preemptions >= cap
        self.queues.waiting.remove(sequence)
        reserved = sequence.length_cap if sequence.whole else sequence.known
        sequence.covered = ledger.reserve(sequence.seq_id, reserved, whole=sequence.whole)
        if self.forecast is not None:
            self.forecast.watch(sequence)
        request = sequence.request
        self._admissions.append(
            Admission(
                sequence.seq_id,
                sequence.epoch,
                sequence.tokens(),
                len(sequence.outputs),
                request.params,
                request.stop_ids,
                request.tenant,
            )
        )
        self.keep(sequence)
        self._chunk(sequence, tokens)
        return True

    def preempt(self, victim: Sequence) -> None:
        """Take everything from a sequence at once: memory, slot, progress; it waits again. Tokens stay known."""
        self.ledger.release(victim.seq_id)
        if self.forecast is not None:
            self.forecast.lost(victim.seq_id)
        victim.restart()
        self.requeue(victim)
        self.releases.append(victim.seq_id)
        self._released.add(victim.seq_id)
        self.preempted.append(victim)

    def requeue(self, victim: Sequence) -> None:
        """Where a victim waits."""
        requeue(self.queues, self.ledger, victim)

    def pop_victim(self, sequence: Sequence) -> Sequence | None:
        """Take the victim for `sequence` out of what runs: the last one after it that has not reserved its end."""
        running = self.running
        first = running.index(sequence) + 1
        for place in range(len(running) - 1, first - 1, -1):
            if not running[place].whole:
                return running.pop(place)
        return None

    # ------------------------------------------------------------ inside

    def _append(self, sequence: Sequence) -> bool:
        """Memory for one more token of a decode; makes room by preemption. False: it preempted itself."""
        ledger, seq_id, known = self.ledger, sequence.seq_id, sequence.known
        while not ledger.may_append(seq_id, known):
            victim = self.pop_victim(sequence)
            self.preempt(sequence if victim is None else victim)
            if victim is None:
                return False
        if known > sequence.covered:
            sequence.covered = ledger.grow(seq_id, known)
            if self.forecast is not None:
                self.forecast.watch(sequence)
        return True

    def _over_budget(self, tokens: int) -> Refusal | None:
        if tokens <= 0:
            return Refusal("budget", 1, 0)
        if self.budget_tokens is not None and self.num_tokens + tokens > self.budget_tokens:
            return Refusal("budget", tokens, self.budget_tokens - self.num_tokens)
        return None

    def _no_memory(self, sequence: Sequence) -> Refusal | None:
        """Why a waiting sequence's memory cannot be reserved now, or None."""
        ledger = self.ledger
        cap = ledger.rule.preemption_cap
        whole = cap is not None and sequence.preemptions >= cap
        if whole or ledger.whole_groups:
            beside = None
            if whole:
                others = (s.length_cap for place in (self.running, self.kept) for s in place if not s.whole)
                beside = max(others, default=0)
            refusal = ledger.may_finish(sequence.length_cap, beside)
            if refusal is not None:
                return refusal
        forecast = self.forecast
        growth = 0 if forecast is None else forecast.groups(None if whole else forecast.expect(sequence))
        return ledger.may_admit(sequence.length_cap if whole else sequence.known, growth)

    def _chunk(self, sequence: Sequence, tokens: int) -> None:
        start = sequence.computed
        if not 0 < tokens <= sequence.goal - start:
            raise InvariantError(f"{tokens} tokens proposed for {sequence!r}, which has {sequence.left} left")
        chunk = Chunk(sequence.seq_id, sequence.epoch, start, tokens, start + tokens == sequence.known)
        sequence.status = Status.IN_FLIGHT
        self.num_tokens += tokens
        self._prefills.append(chunk)
        if not chunk.samples:
            self.unsampled.append((sequence, chunk))

    def freeze(self, step_id: int) -> StepPlan:
        """The plan. `queues.running` becomes what runs after it."""
        queues = self.queues
        queues.running = [*self.running, *self.kept] if self.running else self.kept
        queues.in_order = queues.in_order and self._in_order and not (self.running and self.kept)
        return StepPlan(
            step_id,
            tuple(self._prefills + self._decodes),
            tuple(self._admissions),
            tuple(self.releases),
            tuple(sequence.seq_id for sequence in self.preempted),
            tuple(sequence.seq_id for sequence in self.ignored),
        )


def requeue(queues: Queues, ledger: KvLedger, victim: Sequence) -> None:
    """Put a victim back where the admission rule says it waits."""
    if ledger.rule.requeue_by_arrival:
        queues.waiting.insert_by_arrival(victim)
    else:
        queues.waiting.push_front(victim)
