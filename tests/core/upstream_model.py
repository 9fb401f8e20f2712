"""A second, independent scheduler, written from the published description only, faults included; the judge of ours.

It makes recordings in the format of the reference schedules: the same virtual clock and driver. It shares no code and
no data structure with engine/core, and nothing in engine/core may import it. Faults kept: re-admission of a victim in
the same step, results applied to a later attempt, preemptions lost in empty steps, outputs counted anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Seq:
    """One request of the model. state: waiting, running (in a batch in flight), paused, finished, ignored."""

    name: str
    arrival: float
    prompt: int
    max_tokens: int
    out: int = 0
    done: int = 0  # prompt tokens processed
    prefilled: bool = False
    state: str = "waiting"

    @property
    def length(self) -> int:
        return self.prompt + self.out

    def restart(self) -> None:
        self.state, self.done, self.prefilled = "waiting", 0, False
        self.prompt, self.out = self.prompt + self.out, 0


@dataclass
class Model:
    """The five policies over one paged memory. config: as in a recording."""

    config: dict[str, Any]
    waiting: list[Seq] = field(default_factory=list)
    running: list[Seq] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    turn: str = "prefill"

    def __post_init__(self) -> None:
        c, self.params = self.config, self.config["scheduler_params"]
        self.kind, self.total, self.block = c["scheduler"], c["num_gpu_blocks"], c["block_size"]
        self.reserving = self.kind in ("orca", "faster_transformer")
        self.low_water = 0 if self.reserving else int(0.01 * self.total)
        self.limit = c["max_model_len"]
        if self.kind == "vllm":
            self.limit = min(self.params.get("max_batched_tokens") or self.limit, self.limit)
        self.sizes: list[int] = []
        if self.params.get("enable_dynamic_chunking_schedule"):
            low, high, n = (self.params[k] for k in ("low_chunk_size", "high_chunk_size", "chunk_schedule_stages"))
            even = [int(low + i * (high - low) / max(1, n - 1)) for i in range(n)]
            self.sizes = [round(size / 32) * 32 for size in even][::-1]

    # -- memory
    @property
    def free(self) -> int:
        return self.total - sum(self.blocks.values())

    def need(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def can_allocate(self, s: Seq) -> bool:
        return self.free - self.need(self.config["max_model_len"] if self.reserving else s.length) >= self.low_water

    def allocate(self, s: Seq) -> None:
        self.blocks[s.name] = self.need(self.config["max_model_len"] if self.reserving else s.length)

    # -- one call of schedule()
    def schedule(self, now: float) -> None:
        self.now, self.batch, self.preempted, self.ignored, self.batched = now, [], [], [], 0
        if self.kind != "faster_transformer" and self.kind != "vllm":
            self.sort()
        getattr(self, "_" + self.kind)()

    def sort(self) -> None:
        self.running.sort(key=lambda s: self.now - s.arrival, reverse=True)

    def emit(self, s: Seq, chunk: int) -> None:
        self.batch.append((s, chunk))
        self.batched += max(chunk, 1) if chunk <= 0 else chunk

    def chunk(self, s: Seq) -> int:
        size = self.params.get("chunk_size", 512)
        if self.sizes:
            tokens = -(-self.params["chunk_schedule_max_tokens"] // self.params["chunk_schedule_stages"])
            size = self.sizes[s.done // tokens]  # IndexError: the published crash
        return min(s.prompt - s.done, size - self.batched)

    def decode_walk(self, kept: list[Seq], partial: list[Seq] | None) -> None:
        queue = self.running
        while queue:
            s = queue.pop(0)
            if s.state != "paused":
                kept.append(s)
            elif not s.prefilled:
                (kept if partial is None else partial).append(s)
            else:
                while self.free <= 0:
                    victim = queue.pop() if queue else s
                    self.blocks.pop(victim.name)
                    self.waiting.insert(0, victim)
                    self.preempted.append(victim)
                    if victim is s:
                        break
                else:
                    self.blocks[s.name] = max(self.blocks[s.name], self.need(s.length))
                    kept.append(s)
                    self.emit(s, 0)
        self.running = kept

    def admit(self, into: list[Seq], chunk_of: Any) -> None:
        while self.waiting:
            s = self.waiting[0]
            if s.arrival > self.now:
                return
            if s.length > self.limit:
                s.state = "ignored"
                self.ignored.append(self.waiting.pop(0))
                continue
            if not self.can_allocate(s) or len(into) >= self.config["max_num_seqs"]:
                return
            n = chunk_of(s)
            if n == 0:
                return
            self.waiting.pop(0)
            self.allocate(s)
            self.emit(s, n)
            into.append(s)

    def _sarathi(self) -> None:
        kept: list[Seq] = []
        partial: list[Seq] = []
        self.decode_walk(kept, partial)
        for s in partial:
            n = self.chunk(s)
            if n:
                self.emit(s, n)
            kept.append(s)
        self.admit(kept, self.chunk)

    def _vllm(self) -> None:
        self.admit(self.running, lambda s: s.length if self.batched + s.length <= self.limit else 0)
        if not self.batch and not self.ignored:
            self.sort()
            self.decode_walk([], None)

    def _orca(self) -> None:
        for s in self.running:
            if s.state == "paused":
                self.emit(s, 0)
        self.admit(self.running, lambda s: s.length)

    def _faster_transformer(self) -> None:
        for s in self.running:
            if s.state == "paused":
                self.emit(s, 0)
        if not self.batch:
            self.admit(self.running, lambda s: s.length)

    def _simple_chunking(self) -> None:
        if self.turn == "prefill":
            for s in self.running:
                if s.state == "paused" and not s.prefilled:
                    n = self.chunk(s)
                    if n:
                        self.emit(s, n)
            if not self.batch:
                self.admit(self.running, self.chunk)
            if self.batch or self.ignored:
                self.turn = "decode"
                return
        self.decode_walk([], None)
        self.turn = "prefill"


def record(config: dict[str, Any], workload: list[dict[str, Any]], max_events: int = 4000) -> dict[str, Any]:
    """Run the model under the recordings' driver and virtual clock. Ends early at a published crash or a livelock."""
    model = Model(config)
    model.waiting = [Seq(str(w["id"]), w["arrival"], w["prompt_tokens"], w["max_tokens"]) for w in workload]
    events: list[dict[str, Any]] = []
    flights: deque[tuple[int, list[tuple[Seq, int]]]] = deque()
    now, iteration, pp, outcome, idle = 0.0, -1, config["pp"], "finished", 0
    while (model.waiting or model.running) and len(events) < max_events:
        while len(flights) < pp:
            iteration += 1
            before = model.free
            try:
                model.schedule(now)
            except IndexError:
                return _finish(config, workload, events, "stage overflow")
            batch = sorted(model.batch, key=lambda entry: entry[1] <= 0)  # prefills first, stable
            events.append(_schedule_event(model, iteration, now, batch, before))
            if any(chunk < 0 for _, chunk in batch):
                return _finish(config, workload, events[:-1], "negative chunk")
            if batch or (pp > 1 and model.preempted):  # with one stage, an empty step's preemptions are lost
                for s in model.preempted:
                    s.restart()
            for s, _ in batch:
                s.state = "running"
            if not batch:
                break
            flights.append((iteration, batch))
            now += config["step_cost"]["base"] + config["step_cost"]["per_token"] * model.batched
        if flights:
            events.append(_complete(model, *flights.popleft()))
            idle = 0
        else:
            idle += 1
            if model.waiting and model.waiting[0].arrival > now:
                now = model.waiting[0].arrival
            elif idle > 5:
                outcome = "livelock"
                break
    return _finish(config, workload, events, outcome)


def _schedule_event(model: Model, iteration: int, now: float, batch: list[tuple[Seq, int]], before: int) -> Any:
    return {
        "event": "schedule",
        "iteration": iteration,
        "now": now,
        "scheduled": [{"id": s.name, "prompt_tokens": n, "output_tokens": int(n <= 0)} for s, n in batch],
        "preempted": [s.name for s in model.preempted],
        "ignored": [s.name for s in model.ignored],
        "num_batched_tokens": model.batched,
        "free_blocks_before": before,
        "free_blocks_after": model.free,
        "running": [s.name for s in model.running],
        "num_waiting": len(model.waiting),
    }


def _complete(model: Model, iteration: int, batch: list[tuple[Seq, int]]) -> dict[str, Any]:
    generated, finished = [], []
    for s, chunk in batch:
        if s.state == "waiting":
            continue
        if not s.prefilled:
            s.done += chunk
            s.prefilled = s.done >= s.prompt
        s.state = "paused"
        if s.prefilled:
            s.out += 1
            generated.append(s.name)
            if s.out == s.max_tokens:
                s.state = "finished"
                finished.append(s.name)
                model.blocks.pop(s.name, None)
    model.running = [s for s in model.running if s.state != "finished"]
    return {"event": "complete", "iteration": iteration, "generated": generated, "finished": finished}


def _finish(config: dict[str, Any], workload: list[Any], events: list[Any], outcome: str) -> dict[str, Any]:
    return {"name": "model", "config": config, "summary": {"outcome": outcome}, "workload": workload, "events": events}
