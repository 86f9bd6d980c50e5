"""Rows of one model driven directly, without engine thread and requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from runner_server.engine.batch_planner import BatchPlanner
from runner_server.engine.types import CachePolicy
from runner_server.engine.work import DecodeItem

if TYPE_CHECKING:
    from runner_server.engine.backend import Executor, LoadedModel, Matcher
    from runner_server.engine.prefill_queue import PrefillLimits
    from runner_server.engine.types import Event, Sampling


class LocalBatch:
    """Plans and runs the work items of rows on one executor.

    Args:
        executor: An executor without rows.
        limits: Limits of the model's prefill chunks.
    """

    def __init__(self, executor: Executor, limits: PrefillLimits) -> None:
        self.executor = executor
        self._planner = BatchPlanner(limits, executor.find_prefix)

    @classmethod
    def of(cls, model: LoadedModel) -> LocalBatch:
        """Return a batch of a model without rows."""
        return cls(model.new_executor(), model.prefill_limits)

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy | None = None,
        *,
        matcher: Matcher | None = None,
    ) -> None:
        """Add a row; the following steps prefill the prompt."""
        policy = cache_policy or CachePolicy()
        self.executor.add(row, prompt_ids, sampling, policy, matcher)
        needs_logits = sampling.prompt_logprobs is not None
        self._planner.add(row, prompt_ids, policy, needs_logits=needs_logits)

    def step(self) -> list[Event]:
        """Prefill prompts for a slice of time, then make one decode step."""
        events: list[Event] = []
        while item := self._planner.next_item():
            events += self._planner.record(item, self.executor.run(item))
            if isinstance(item, DecodeItem):
                break
        return events

    def preempt(self, row: int) -> None:
        """Exclude a row with at least one token from the steps; keep its KV cache."""
        self.executor.preempt(row)
        self._planner.remove(row)

    def resume(self, row: int) -> None:
        """Continue a preempted row."""
        self._planner.resume(row)

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, preempted ones included, and free their memory."""
        self.executor.remove(rows)
        for row in rows:
            self._planner.remove(row)

    def close(self) -> None:
        """Free everything; the batch cannot be used again."""
        self.executor.close()
