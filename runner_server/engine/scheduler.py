"""Who has a place in the batch, who waits for one, and whose reader is behind."""

from __future__ import annotations

from collections import deque

from runner_server.engine.backend import LoadedModel
from runner_server.engine.generation_request import GenerationRequest


class Scheduler:
    """The completions that the engine's thread has, each in one of four states.

    Attributes:
        waiting: Have not begun, in order of arrival.
        running: Are evaluated or decoded.
        preempted: Set aside because their readers are behind; they hold their memory.
        resuming: Set aside, but their readers have read on; in that order.
    """

    def __init__(self) -> None:
        self.waiting: deque[GenerationRequest] = deque()
        self.running: dict[int, GenerationRequest] = {}
        self.preempted: dict[int, GenerationRequest] = {}
        self.resuming: deque[GenerationRequest] = deque()

    @property
    def admitted(self) -> list[GenerationRequest]:
        """Those that hold memory."""
        return [*self.running.values(), *self.preempted.values(), *self.resuming]

    def preempt(self, completion: GenerationRequest) -> None:
        """Takes the place of one that runs."""
        self.preempted[completion.id] = self.running.pop(completion.id)

    def resume(self, id_: int) -> None:
        """Lets one that was set aside wait for a place; nothing happens if it has ended."""
        if completion := self.preempted.pop(id_, None):
            self.resuming.append(completion)

    def next(self, model: LoadedModel) -> GenerationRequest | None:
        """Seats the next one that may run: those that return first, then in order.

        Returns:
            The one that now runs; None if there is none, or no place or memory for it.
        """
        if not self.has_next(model):
            return None
        completion = (self.resuming or self.waiting).popleft()
        self.running[completion.id] = completion
        return completion

    def has_next(self, model: LoadedModel) -> bool:
        """Whether :meth:`next` would seat one."""
        queue = self.resuming or self.waiting
        has_place = len(self.running) < model.info.parallel
        return bool(queue) and has_place and self._fits(queue[0], model)

    def remove(self, id_: int) -> GenerationRequest | None:
        """Takes one out; returns it if it holds memory."""
        for queue in (self.waiting, self.resuming):
            for completion in queue:
                if completion.id == id_:
                    queue.remove(completion)
                    return completion if queue is self.resuming else None
        return self.running.pop(id_, None) or self.preempted.pop(id_, None)

    def clear(self) -> None:
        """Takes all out."""
        for group in (self.waiting, self.running, self.preempted, self.resuming):
            group.clear()

    def _fits(self, completion: GenerationRequest, model: LoadedModel) -> bool:
        """Whether the memory of all would suffice, should each become as long as it may."""
        if not self.running and completion in self.resuming:
            # The others are set aside, and their readers must not hold this one up. At worst
            # it takes what one sequence may, beyond the budget.
            return True
        lengths = [other.max_length for other in (*self.running.values(), completion)]
        # A batch is as wide as its longest row.
        need = len(lengths) * model.kv_bytes(max(lengths))
        aside = (*self.preempted.values(), *self.resuming)
        # What is set aside does not grow.
        need += sum(model.kv_bytes(other.length) for other in aside if other is not completion)
        return need <= model.info.kv_budget_bytes
