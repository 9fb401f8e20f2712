"""The one seam between deciding and doing: an executor runs step plans, in order.

The loop may submit up to `depth` plans before it waits; results come back in the order of submission.
"""

from __future__ import annotations

from typing import Protocol

from engine.core.plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans. Submit never blocks on the device; wait returns the oldest unreturned result."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step. A plan may hold releases only (no chunks): it still yields a result."""

    def wait(self) -> StepResult:
        """The result of the oldest submitted plan. Raises InvariantError when none is outstanding."""

    def close(self) -> None:
        """Give back every slot, page and thread. Idempotent."""
