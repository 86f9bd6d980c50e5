"""What a runner holds at one moment: the one place where tests look behind its properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_client import AsyncRunnerProcess, RunnerProcess
    from runner_client.process.child import Child
    from runner_client.process.launch import Plan


@dataclass(frozen=True)
class ProcessView:
    """Snapshot of a runner that was started.

    Attributes:
        child: The child of the last start.
        plan: The launch that the gate admitted for this child.
        stderr_tail: The last lines written by the child to standard error.
        exit_reason: How the child ended, in words.
    """

    child: Child
    plan: Plan
    stderr_tail: tuple[str, ...]
    exit_reason: str

    @classmethod
    def of(cls, runner: RunnerProcess | AsyncRunnerProcess) -> ProcessView:
        """Look at a runner that was started; the child may go on meanwhile."""
        child, plan = runner._life.child, runner._life.plan
        assert child is not None
        assert plan is not None
        return cls(child, plan, child.stderr_tail, child.exit_error().exit_reason)
