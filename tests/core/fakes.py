"""An executor of a few lines that holds the scheduler to its side of the contract, and helpers to build engines.

Its "model" is a hash of everything before a token, so an output is right only if every token before it was, and the
truth for a request alone is `expected()`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core.ledger import EXACT, AdmissionRule, KvLedger
from engine.core.loop import EngineLoop
from engine.core.plan import Failure, SampledToken, StepPlan, StepResult, Update
from engine.core.policies import ChunkSchedule, Pace, make_policy
from engine.core.request import Request, SamplingParams
from engine.core.scheduler import Scheduler

VOCAB = 997
NO_STOP: frozenset[int] = frozenset()


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: an id from all tokens so far."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCAB


def expected(request: Request, limit: int) -> tuple[list[int], str]:
    """(outputs, finish reason) of a request served alone with known tokens up to `limit`."""
    tokens = list(request.prompt)
    params = request.params
    outputs: list[int] = []
    while True:
        token = next_token(tokens)
        tokens.append(token)
        outputs.append(token)
        if token in request.stop_ids and len(outputs) > params.min_tokens:
            return outputs, "stop"
        if len(outputs) == params.max_tokens or len(tokens) >= limit:
            return outputs, "length"


@dataclass
class _Slot:
    tokens: list[int]
    epoch: int
    computed: int = 0


@dataclass
class FakeExecutor:
    """Runs plans with next_token(). Raises AssertionError for whatever a plan must not do.

    ahead: a sequence may be in several steps in flight; what follows a chunk that did not run is refused.
    refuse, fail: probability that a chunk's memory is refused or that it fails; physical: groups there really are
    (None: enough), with groups_for as in the ledger. shuffle: the order of tokens in a result is not promised.
    """

    max_slots: int
    ahead: bool = False
    group_tokens: int = 16
    physical: int | None = None
    refuse: float = 0.0
    fail: float = 0.0
    seed: int = 0
    slots: dict[int, _Slot] = field(default_factory=dict)
    plans: deque[StepPlan] = field(default_factory=deque)
    steps: list[StepPlan] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.epochs: dict[int, int] = {}

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        assert not plan.is_empty, "an empty plan was submitted"
        assert not self.steps or plan.step_id > self.steps[-1].step_id
        assert len({c.seq_id for c in plan.chunks}) == len(plan.chunks), "a sequence is twice in a step"
        in_flight = {c.seq_id for other in self.plans for c in other.chunks}
        released = {s for other in self.plans for s in other.releases} | set(plan.releases)
        again = in_flight & {c.seq_id for c in plan.chunks} - released
        assert self.ahead or not again, f"{again} are in flight already"
        admitted = {a.seq_id for a in plan.admissions}
        assert not admitted & set(plan.releases), "released and admitted by one plan"
        assert admitted <= {c.seq_id for c in plan.chunks}
        self.plans.append(plan)
        self.steps.append(plan)

    def wait(self) -> StepResult:
        """See Executor."""
        assert self.plans, "wait() would block for ever"
        plan = self.plans.popleft()
        for seq_id in plan.releases:
            self.slots.pop(seq_id, None)
        for a in plan.admissions:
            assert a.seq_id not in self.slots, f"{a.seq_id} has a slot already"
            assert a.epoch > self.epochs.get(a.seq_id, -1), "a new admission needs a new epoch"
            self.epochs[a.seq_id] = a.epoch
            self.slots[a.seq_id] = _Slot(list(a.tokens), a.epoch)
        assert len(self.slots) <= self.max_slots, "more sequences than slots"
        tokens, refused, failed = [], [], []
        for c in plan.chunks:
            slot = self.slots.get(c.seq_id)
            if self.ahead and (slot is None or (slot.epoch, slot.computed) != (c.epoch, c.start)):
                refused.append(c.seq_id)
                continue
            assert slot is not None
            assert (slot.epoch, slot.computed) == (c.epoch, c.start), (slot, c)
            assert c.length >= 1 and c.end <= len(slot.tokens)
            assert c.samples == (c.end == len(slot.tokens))
            if self._refuses(c.seq_id, c.end):
                refused.append(c.seq_id)
                del self.slots[c.seq_id]
                continue
            if self.rng.random() < self.fail:
                failed.append(Failure(c.seq_id, c.epoch, "logits are not finite"))
                continue
            slot.computed = c.end
            if c.samples:
                token = next_token(slot.tokens)
                slot.tokens.append(token)
                tokens.append(SampledToken(c.seq_id, c.epoch, token))
        self.rng.shuffle(tokens)
        return StepResult(plan.step_id, tuple(tokens), tuple(refused), tuple(failed))

    def _refuses(self, seq_id: int, end: int) -> bool:
        if self.physical is not None:
            others = sum(-(-s.computed // self.group_tokens) for k, s in self.slots.items() if k != seq_id)
            return others + -(-end // self.group_tokens) > self.physical
        return self.rng.random() < self.refuse

    def close(self) -> None:
        """See Executor."""
        self.closed = True
        self.slots.clear()


def make_scheduler(
    policy: str = "sarathi",
    *,
    groups: int = 64,
    group_tokens: int = 16,
    max_num_seqs: int = 8,
    max_model_len: int = 256,
    depth: int = 1,
    chunk_tokens: int | None = None,
    schedule: ChunkSchedule | None = None,
    rule: AdmissionRule = EXACT,
    ahead: bool = False,
    prompt_order: str = "arrival",
) -> Scheduler:
    """A scheduler with small numbers. Order "deadline" comes with a pace of 10 to 20 ms and a target of 50."""
    ledger = KvLedger(groups, lambda tokens: -(-tokens // group_tokens), rule)
    pace = Pace(0.01, 0.02) if prompt_order == "deadline" else None
    made = make_policy(policy, max_model_len=max_model_len, chunk_tokens=chunk_tokens, schedule=schedule, pace=pace,
                       prompt_order=prompt_order, ttft_target_s=pace and 0.05)  # fmt: skip
    return Scheduler(made, ledger, max_num_seqs=max_num_seqs, max_model_len=max_model_len, depth=depth, ahead=ahead,
                     pace=pace)  # fmt: skip


def make_loop(scheduler: Scheduler, **options: object) -> tuple[EngineLoop, FakeExecutor]:
    """A loop over a fake executor with as many slots as the scheduler believes."""
    executor = FakeExecutor(scheduler.max_num_seqs, scheduler.ahead, **options)  # type: ignore[arg-type]
    return EngineLoop(scheduler, executor), executor


def make_request(
    name: str,
    prompt: Sequence[int] | int,
    max_tokens: int | None = 16,
    *,
    arrival_s: float = 0.0,
    priority: int = 0,
    stop_ids: frozenset[int] = NO_STOP,
    min_tokens: int = 0,
) -> Request:
    """A request; `prompt` may be a length, then its tokens follow from the name."""
    if isinstance(prompt, int):
        rng = random.Random(name)
        prompt = [rng.randrange(VOCAB) for _ in range(prompt)]
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    return Request(name, tuple(prompt), params, arrival_s, stop_ids, priority)


@dataclass
class Collected:
    """What a client saw. It refuses news after the end."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def take(self, updates: Sequence[Update]) -> None:
        """Add updates."""
        for update in updates:
            assert update.request_id not in self.reasons, f"{update} after the end"
            self.tokens.setdefault(update.request_id, []).extend(update.tokens)
            if update.finish_reason is not None:
                self.reasons[update.request_id] = update.finish_reason
            if update.error is not None:
                self.errors[update.request_id] = update.error


def run(loop: EngineLoop, collected: Collected | None = None, *, max_steps: int = 20_000) -> Collected:
    """Step until there is no work; the scheduler's invariants are checked after every step."""
    seen = collected or Collected()
    for _ in range(max_steps):
        if not loop.has_work:
            return seen
        seen.take(loop.step())
        loop.scheduler.check()
    raise AssertionError(f"still at work after {max_steps} steps: {loop.stats()}")
