"""Feed a recorded schedule to our policy and compare every step.

    python -m scripts.replay_schedule FILE.json[.gz] ... [--admission upstream] [--memory] [--mutate]

A recording holds arrivals, the `now` of each schedule event, and which sequences got a token or ended at each complete
event; those drive our scheduler. Compared at every schedule event: content and order of the batch, preempted ids,
ignored ids (--memory: also free groups, the running ids and the number waiting). Prints `FILE: N events, 0 mismatches`
(N schedule events) or the first difference. Exit status 1 on a difference, 2 for a file that cannot be replayed.

It stops early only where the recorded system corrupted itself: it re-admits its own victim in the step that preempted
it (QUIRK 4), or applies a result of before a preemption to the sequence's next attempt (QUIRK 9).

--mutate replays with deliberately broken rules instead and fails unless the files together catch each of them.
It knows no model and no memory: a token is 0, and 1 where the recording ends a sequence.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.draft import StepDraft
from engine.core.errors import ConfigError, InvariantError, Refusal
from engine.core.ledger import ADMISSION_RULES, NO_LIMIT_TOKENS, AdmissionRule, KvLedger
from engine.core.plan import SampledToken, StepPlan, StepResult
from engine.core.policies import ChunkSchedule, Policy, make_policy
from engine.core.request import Request, SamplingParams
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence

GOES_ON, ENDS = 0, 1  # the two tokens of a replay


@dataclass(frozen=True, slots=True)
class Recording:
    """A file's content. events: schedule and complete events, in order."""

    path: str
    config: dict[str, Any]
    workload: list[dict[str, Any]]
    events: list[dict[str, Any]]


def load(path: str) -> Recording:
    """Read a recording. Raises ConfigError naming the file and what is wrong with it."""
    try:
        raw = Path(path).read_bytes()
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        return Recording(path, data["config"], data["workload"], data["events"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a recorded schedule: {type(error).__name__}: {error}") from error


def policy_of(recording: Recording) -> Policy:
    """The policy that a recording's configuration names. Raises ConfigError for one that we do not have."""
    config = recording.config
    params = dict(config.get("scheduler_params") or {})
    name = str(config["scheduler"]).lower()
    if config.get("variant", "serve") != "serve":
        raise ConfigError(
            f"{recording.path}: variant {config['variant']!r} has other rules (one prompt a step, first token a step "
            "late); only recordings of variant 'serve' can be compared"
        )
    schedule = None
    if params.get("enable_dynamic_chunking_schedule"):
        schedule = ChunkSchedule(
            low_tokens=params["low_chunk_size"],
            high_tokens=params["high_chunk_size"],
            max_tokens=params["chunk_schedule_max_tokens"],
            stages=params["chunk_schedule_stages"],
        )
    budget_of = {"vllm": "max_batched_tokens", "orca": None, "faster_transformer": None}.get(name, "chunk_size")
    chunk_tokens = params.get(budget_of) if budget_of else None
    return make_policy(name, max_model_len=config["max_model_len"], chunk_tokens=chunk_tokens, schedule=schedule)


class RecordedScheduler(Scheduler):
    """Our scheduler, but sequences end when the recording says so."""

    def _length_cap(self, request: Request) -> int:
        return NO_LIMIT_TOKENS


@dataclass(frozen=True, slots=True)
class Rules:
    """What to replay with: the scheduler's class and the admission rule; a mutation changes one of them."""

    scheduler: type[RecordedScheduler] = RecordedScheduler
    admission: AdmissionRule = ADMISSION_RULES["upstream"]


@dataclass(slots=True)
class Outcome:
    """How a replay went. compared: schedule events found equal. difference: the first one; stopped: why it ended."""

    compared: int = 0
    difference: str | None = None
    stopped: str | None = None

    def line(self, path: str) -> str:
        """One line for people and for grep."""
        if self.difference is not None:
            return f"{path}: first difference after {self.compared} equal events: {self.difference}"
        stopped = f" (stopped at {self.stopped})" if self.stopped else ""
        return f"{path}: {self.compared} events, 0 mismatches{stopped}"


@dataclass(slots=True)
class Replay:
    """One recording against one scheduler."""

    recording: Recording
    rules: Rules
    memory: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    scheduler: RecordedScheduler = field(init=False)
    ledger: KvLedger = field(init=False)
    _names: dict[int, str] = field(default_factory=dict)
    _plans: deque[tuple[int, StepPlan]] = field(default_factory=deque)  # (iteration, plan), results awaited
    _scheduled_at: dict[str, int] = field(default_factory=dict)  # id -> last event that scheduled it
    _preempted_at: dict[str, int] = field(default_factory=dict)
    _batch_at: dict[int, int] = field(default_factory=dict)  # iteration -> its event

    def __post_init__(self) -> None:
        config = self.recording.config
        block = config["block_size"]
        self.ledger = KvLedger(config["num_gpu_blocks"], lambda tokens: -(-tokens // block), self.rules.admission)
        self.scheduler = self.rules.scheduler(
            policy_of(self.recording),
            self.ledger,
            max_num_seqs=config["max_num_seqs"],
            max_model_len=config["max_model_len"],
            depth=config.get("pp", 1),
        )

    def run(self) -> Outcome:
        """Replay to the end, the first difference, or the first event in which the recorded system broke itself."""
        params = SamplingParams(max_tokens=None)
        for entry in self.recording.workload:
            prompt = (GOES_ON,) * entry["prompt_tokens"]
            request = Request(str(entry["id"]), prompt, params, entry["arrival"], frozenset((ENDS,)))
            self._names[self.scheduler.add(request, validate=False)] = request.request_id
        for index, event in enumerate(self.recording.events):
            compare = self._schedule if event["event"] == "schedule" else self._complete
            compare(index, event)
            if self.outcome.difference or self.outcome.stopped:
                break
        return self.outcome

    def _differs(self, index: int, event: dict[str, Any], what: str, recorded: object, ours: object) -> None:
        where = f"event {index} (iteration {event['iteration']}" + (f", now {event['now']})" if "now" in event else ")")
        self.outcome.difference = f"{where}: {what}: recorded {recorded}, ours {ours}{self._hint(event)}"

    def _hint(self, event: dict[str, Any]) -> str:
        """A known fault of the recorded system that explains a difference which we cannot copy."""
        if any(entry["prompt_tokens"] < 0 for entry in event.get("scheduled", ())):
            return " [the recording has a negative chunk: QUIRK 3]"
        for earlier in self.recording.events:
            if earlier is event:
                return ""
            if earlier.get("preempted") and not earlier["scheduled"] and self.recording.config.get("pp", 1) == 1:
                return " [the recorded system lost a preemption of an empty step: QUIRKs 7 and 8]"
        return ""

    def _schedule(self, index: int, event: dict[str, Any]) -> None:
        plan = self.scheduler.plan(event["now"])
        names = self._names
        recorded = [(str(e["id"]), e["prompt_tokens"], e["output_tokens"]) for e in event["scheduled"]]
        preempted = [str(name) for name in event["preempted"]]
        ours_preempted = [names[seq_id] for seq_id in plan.preempted]
        if ours_preempted != preempted:
            return self._differs(index, event, "preempted", preempted, ours_preempted)
        again = {name for name, _, _ in recorded} & set(preempted)
        if again:
            self.outcome.stopped = (
                f"event {index}, iteration {event['iteration']}: the recorded system re-admits its own victim "
                f"{', '.join(sorted(again))} in the same step, QUIRK 4; {self.outcome.compared} events compared"
            )
            return None
        ours = []
        for chunk in plan.chunks:
            sequence = self.scheduler.sequence(chunk.seq_id)
            decode = sequence is not None and chunk.end > sequence.goal
            ours.append((names[chunk.seq_id], 0, 1) if decode else (names[chunk.seq_id], chunk.length, 0))
        if ours != recorded:
            return self._differs(index, event, "batch (id, prompt tokens, output tokens)", recorded, ours)
        ignored = [str(name) for name in event["ignored"]]
        ours_ignored = [names[seq_id] for seq_id in plan.ignored]
        if ours_ignored != ignored:
            return self._differs(index, event, "ignored", ignored, ours_ignored)
        if self.memory and not self._same_memory(index, event):
            return None
        self.outcome.compared += 1
        if not plan.is_empty:
            self._plans.append((event["iteration"], plan))
        self._batch_at[event["iteration"]] = index
        self._preempted_at.update(dict.fromkeys(preempted, index))
        self._scheduled_at.update(dict.fromkeys((name for name, _, _ in recorded), index))
        return None

    def _same_memory(self, index: int, event: dict[str, Any]) -> bool:
        queues = self.scheduler.queues
        pairs = (
            ("free groups after", event["free_blocks_after"], self.ledger.free_groups),
            ("running", [str(n) for n in event["running"]], [s.request_id for s in queues.running]),
            ("waiting", event["num_waiting"], len(queues.waiting)),
        )
        for what, recorded, ours in pairs:
            if recorded != ours:
                self._differs(index, event, what, recorded, ours)
                return False
        return True

    def _complete(self, index: int, event: dict[str, Any]) -> None:
        """Give our scheduler what the recorded step produced."""
        while self._plans and not self._plans[0][1].chunks:  # releases alone: the recorded system had no such step
            self.scheduler.commit(StepResult(self._plans.popleft()[1].step_id))
        iteration, plan = self._plans.popleft() if self._plans else (None, StepPlan(-1))
        if iteration != event["iteration"]:
            return self._differs(index, event, "completed iteration", event["iteration"], iteration)
        stale = [name for name in self._batch_names(plan) if self._is_stale(name, event["iteration"])]
        if stale:
            self.outcome.stopped = (
                f"event {index}, iteration {event['iteration']}: the recorded system applies a result of before a "
                f"preemption to {', '.join(stale)}, QUIRK 9; {self.outcome.compared} events compared"
            )
            return None
        finished = {str(name) for name in event["finished"]}
        tokens = tuple(
            SampledToken(c.seq_id, c.epoch, ENDS if self._names[c.seq_id] in finished else GOES_ON)
            for c in plan.chunks
            if c.samples
        )
        updates = self.scheduler.commit(StepResult(plan.step_id, tokens))
        ours = sorted(update.request_id for update in updates if update.tokens)
        generated = sorted(str(name) for name in event["generated"])
        if ours != generated:
            return self._differs(index, event, "sequences that got a token", generated, ours)
        return None

    def _batch_names(self, plan: StepPlan) -> list[str]:
        return [self._names[chunk.seq_id] for chunk in plan.chunks]

    def _is_stale(self, name: str, iteration: int) -> bool:
        """Whether a sequence of that iteration's batch was preempted and scheduled again since."""
        batch_at, preempted_at = self._batch_at[iteration], self._preempted_at.get(name, -1)
        return batch_at < preempted_at < self._scheduled_at[name]


# ---------------------------------------------------------------- deliberately broken rules


class _WrongVictim(StepDraft):
    def pop_victim(self, sequence: Sequence) -> Sequence | None:
        after = self.running.index(sequence) + 1
        return self.running.pop(after) if after < len(self.running) else None


class _VictimToTheBack(StepDraft):
    def requeue(self, victim: Sequence) -> None:
        self.queues.waiting.append(victim)


class _OnePrefill(StepDraft):
    def prefill(self, sequence: Sequence, tokens: int) -> bool | Refusal:
        return super().prefill(sequence, 0 if self.num_prefills else tokens)

    def admit(self, sequence: Sequence, tokens: int) -> bool | Refusal:
        return super().admit(sequence, 0 if self.num_prefills else tokens)


class _StrictLength(StepDraft):
    def over_long(self, sequence: Sequence) -> bool:
        return sequence.known >= self.prompt_limit


class _ProgressKept(Sequence):
    __slots__ = ()

    def restart(self) -> None:
        computed = self.computed
        super().restart()
        self.computed = computed


def _with_draft(draft: type[StepDraft]) -> Callable[[Rules], Rules]:
    scheduler = type("MutatedScheduler", (RecordedScheduler,), {"draft_class": draft})
    return lambda rules: dataclasses.replace(rules, scheduler=scheduler)


def _with_sequence(sequence: type[Sequence]) -> Callable[[Rules], Rules]:
    scheduler = type("MutatedScheduler", (RecordedScheduler,), {"sequence_class": sequence})
    return lambda rules: dataclasses.replace(rules, scheduler=scheduler)


def _with_admission(**changes: Any) -> Callable[[Rules], Rules]:
    return lambda rules: dataclasses.replace(rules, admission=dataclasses.replace(rules.admission, **changes))


MUTATIONS: dict[str, Callable[[Rules], Rules]] = {
    "wrong victim": _with_draft(_WrongVictim),
    "victim to the back": _with_draft(_VictimToTheBack),
    "append only when needed": _with_admission(append_only_when_needed=True),
    "progress kept on preemption": _with_sequence(_ProgressKept),
    "no watermark": _with_admission(watermark=0.0),
    "one prefill a batch": _with_draft(_OnePrefill),
    ">= for > at the length limit": _with_draft(_StrictLength),
}


def caught_by(recording: Recording, rules: Rules) -> str | None:
    """How a recording notices that `rules` are broken, or None."""
    try:
        return Replay(recording, rules).run().difference
    except InvariantError as error:
        return f"the scheduler itself refuses it: {error}"


def mutate(recordings: list[Recording], rules: Rules) -> bool:
    """Run each mutation until a recording catches it; one that differs without a mutation proves nothing."""
    sound = []
    for recording in recordings:
        outcome = Replay(recording, rules).run()
        if outcome.difference is None:
            sound.append(recording)
        else:
            print(f"{outcome.line(recording.path)} (without a mutation: not counted)")
    every = len(sound) == len(recordings)
    for name, change in MUTATIONS.items():
        for recording in sound:
            how = caught_by(recording, change(rules))
            if how is not None:
                print(f"mutation {name!r}: caught by {recording.path}: {how}")
                break
        else:
            print(f"mutation {name!r}: NOT CAUGHT by {len(sound)} recordings")
            every = False
    return every


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="replay_schedule", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recorded schedule, .json or .json.gz")
    parser.add_argument("--admission", choices=sorted(ADMISSION_RULES), default="upstream", help="default: upstream")
    parser.add_argument("--memory", action="store_true", help="compare free groups, running and waiting, too")
    parser.add_argument("--mutate", action="store_true", help="break a rule at a time; each must be noticed")
    options = parser.parse_args(arguments)
    rules = Rules(admission=ADMISSION_RULES[options.admission])
    try:
        recordings = [load(path) for path in options.files]
        if options.mutate:
            return 0 if mutate(recordings, rules) else 1
        equal = True
        for recording in recordings:
            outcome = Replay(recording, rules, memory=options.memory).run()
            print(outcome.line(recording.path))
            equal = equal and outcome.difference is None
        return 0 if equal else 1
    except (ConfigError, KeyError, TypeError) as error:
        why = error if isinstance(error, ConfigError) else f"not a recording: {error!r}"
        print(f"error: {why}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
