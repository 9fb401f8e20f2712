"""Runs plans in this process, in order, on the calling thread.

On a GPU submit() launches and returns, so that the next plan is made while this one runs. A CPU has nothing to overlap
with: its kernels use every core, and submit() comes back when the step is done.
"""

from __future__ import annotations

from collections import deque

from engine.core.errors import InvariantError
from engine.core.plan import StepPlan, StepResult
from engine.runner.runner import Launched, Runner


class LocalExecutor:
    """Executor over one Runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._launched: deque[Launched] = deque()

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        self._launched.append(self.runner.launch(plan))

    def wait(self) -> StepResult:
        """See Executor."""
        if not self._launched:
            raise InvariantError("wait() without a submitted plan")
        return self.runner.collect(self._launched.popleft())

    def close(self) -> None:
        """See Executor."""
        self._launched.clear()
        self.runner.close()
