"""Runs plans in this process, one after the other, on the calling thread.

A CPU has nothing to overlap with: the kernels use every core, so a step runs when its result is asked for.
"""

from __future__ import annotations

from collections import deque

from engine.core.errors import InvariantError
from engine.core.plan import StepPlan, StepResult
from engine.runner.runner import Runner


class LocalExecutor:
    """Executor over one Runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        self._plans.append(plan)

    def wait(self) -> StepResult:
        """See Executor."""
        if not self._plans:
            raise InvariantError("wait() without a submitted plan")
        return self.runner.run(self._plans.popleft())

    def close(self) -> None:
        """See Executor."""
        self._plans.clear()
        self.runner.close()
