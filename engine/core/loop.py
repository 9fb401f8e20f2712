"""The engine's one loop: plan, submit, wait, commit. Synchronous, overlapped and pipelined differ only in `depth`.

It knows neither policies nor memory; it moves plans to an executor, results back, and news to whoever calls step().
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping

from engine.core.clock import Clock, MonotonicClock
from engine.core.errors import ConfigError, RequestError
from engine.core.executor import Executor
from engine.core.plan import StepPlan, Update
from engine.core.record import StepRecord
from engine.core.request import Request
from engine.core.scheduler import Scheduler

log = logging.getLogger(__name__)

MAX_LOST_STEPS = 3  # in a row, after which the executor is taken for dead


class EngineLoop:
    """A scheduler and an executor, driven by step(). Not thread-safe: one thread calls everything.

    executor_stats: counts of the executor's side (pages mapped, ...) to add to stats().
    limit_memory: tells the executor's side how many page groups may exist; None where that cannot change.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        clock: Clock | None = None,
        executor_stats: Callable[[], Mapping[str, int]] | None = None,
        limit_memory: Callable[[int], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock or MonotonicClock()
        self._executor_stats = executor_stats
        self._limit_memory = limit_memory
        self._most_groups = scheduler.ledger.total_groups
        self._submitted: deque[int] = deque()  # step ids whose results are awaited, oldest first
        self._lost_steps = 0
        self._lost_in_a_row = 0
        self._closed = False

    def validate(self, request: Request) -> None:
        """Raise RequestError if the request can never be served; queues nothing."""
        self.scheduler.validate(request)

    def add(self, request: Request) -> int:
        """Queue a request. Returns its seq_id. Raises RequestError (see Scheduler.add).

        An arrival after now is taken as now: what is here has arrived, and nothing may wait for a clock.
        """
        now_s = self.clock.now_s()
        if request.arrival_s > now_s:
            request = dataclasses.replace(request, arrival_s=now_s)
        return self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now; the next step frees its slot and reports "abort". False when it is not live."""
        return self.scheduler.abort(request_id)

    def set_kv_limit(self, groups: int) -> int:
        """Let no more than `groups` page groups exist from now on; at most the pool of the start. Kept pages beyond go
        back to the system at once, those in use as their sequences end. Returns the groups in use now.

        Raises ConfigError for a number out of range, RequestError when a live request may need more than that.
        """
        if self._limit_memory is None:
            raise ConfigError("this engine's KV memory cannot change while it runs")
        if not 1 <= groups <= self._most_groups:
            raise ConfigError(f"groups={groups} is not in 1..{self._most_groups}, the pool this engine started with")
        try:
            self.scheduler.resize_pool(groups)
        except ConfigError as error:
            raise RequestError(f"{error}; wait for it to end, or use a higher limit", "groups") from None
        self._limit_memory(groups)
        return self.scheduler.ledger.reserved_groups

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to report. False: block until the next add() or abort()."""
        return self.scheduler.has_work

    def step(self) -> list[Update]:
        """Submit what fits into the pipeline, wait for the oldest step, commit it. Returns the news for clients.

        Never waits without a step in flight and never spins: as long as has_work, a call submits, commits or reports
        something. When the executor raises, the requests of that step end with an error and the rest go on; raises
        what the executor raised once MAX_LOST_STEPS steps in a row were lost.
        """
        self._fill()
        if not self._submitted:
            return self.scheduler.drain()
        return self._finish()

    def _fill(self) -> None:
        """Plan and submit until `depth` steps are in flight or nothing more can be planned."""
        scheduler = self.scheduler
        retried = False
        while scheduler.has_work:
            plan = scheduler.plan(self.clock.now_s())
            if not plan.is_empty:
                if not self._submit(plan):
                    return
            elif not plan.ignored:
                if retried or self._submitted:
                    return
                retried = True  # once: a policy that takes turns may just have had an idle one

    def _submit(self, plan: StepPlan) -> bool:
        try:
            self.executor.submit(plan)
        except Exception as error:
            while self._submitted:  # steps before it are whole; theirs is the older news
                self.scheduler.keep_news(self._finish())
            self._lose(plan.step_id, error)
            return False
        self._submitted.append(plan.step_id)
        return True

    def _finish(self) -> list[Update]:
        """Wait for the oldest submitted step and commit it."""
        step_id = self._submitted.popleft()
        try:
            updates = self.scheduler.commit(self.executor.wait())
        except Exception as error:
            self._lose(step_id, error)
            return self.scheduler.drain()
        self._lost_in_a_row = 0
        return updates

    def _lose(self, step_id: int, error: Exception) -> None:
        """A step came to nothing: its requests end with an error."""
        self._lost_steps += 1
        self._lost_in_a_row += 1
        log.error("step %d was lost: %s", step_id, type(error).__name__, exc_info=error)
        self.scheduler.fail_step(step_id, f"the step failed in the engine ({type(error).__name__})")
        if self._lost_in_a_row >= MAX_LOST_STEPS:
            raise error

    def take_records(self) -> list[StepRecord]:
        """The records of the steps since the last call (at most the newest 4,096)."""
        records = list(self.scheduler.records)
        self.scheduler.records.clear()
        return records

    def stats(self) -> dict[str, int]:
        """Counts now and totals since the start, of the scheduler, the loop and the executor."""
        stats = self.scheduler.stats()
        stats["lost_steps_total"] = self._lost_steps
        if self._executor_stats is not None and not self._closed:
            stats.update(self._executor_stats())
        return stats

    def close(self) -> None:
        """Give back every slot, page and thread. Idempotent; what still runs is lost."""
        if not self._closed:
            self._closed = True
            self.executor.close()
