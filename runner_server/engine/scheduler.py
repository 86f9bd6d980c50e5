"""Admission and preemption: which requests hold a slot of the batch."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from runner_server.engine.backend import LoadedModel
from runner_server.engine.generation_request import GenerationRequest, RequestStatus


class Scheduler:
    """The requests on the engine's thread, in the order of admission.

    Admission is first come, first served: a request that does not fit is not overtaken.
    Preempted requests whose readers have caught up go before those that wait.

    Attributes:
        waiting: Requests that are WAITING, in order of arrival.
        admitted: Requests that hold memory, by id: those in the batch and the PREEMPTED ones.
        resumable: The PREEMPTED requests whose readers have caught up, in that order.
    """

    def __init__(self) -> None:
        self.waiting: deque[GenerationRequest] = deque()
        self.admitted: dict[int, GenerationRequest] = {}
        self.resumable: deque[GenerationRequest] = deque()

    @property
    def running(self) -> list[GenerationRequest]:
        """The requests in the batch."""
        preempted = RequestStatus.PREEMPTED
        return [each for each in self.admitted.values() if each.status is not preempted]

    @property
    def preempted(self) -> list[GenerationRequest]:
        """The requests outside the batch with KV caches."""
        preempted = RequestStatus.PREEMPTED
        return [each for each in self.admitted.values() if each.status is preempted]

    @property
    def has_running(self) -> bool:
        """True if the batch has a request."""
        preempted = RequestStatus.PREEMPTED
        return any(each.status is not preempted for each in self.admitted.values())

    def add(self, request: GenerationRequest) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def mark_resumable(self, request_id: int) -> None:
        """Queue a request to be resumed. No-op unless preempted."""
        request = self.admitted.get(request_id)
        if request is None or request.status is not RequestStatus.PREEMPTED:
            return
        if request not in self.resumable:
            self.resumable.append(request)

    def next(self, model: LoadedModel) -> GenerationRequest | None:
        """Admit or resume the next request if a slot and memory are free.

        Returns:
            The request, now PREFILLING or DECODING; None if no request can run.
        """
        if not self.has_next(model):
            return None
        if self.resumable:
            request = self.resumable.popleft()
            request.resume()
        else:
            request = self.waiting.popleft()
            request.admit()
            self.admitted[request.id] = request
        return request

    def has_next(self, model: LoadedModel) -> bool:
        """Return True if :meth:`next` would return a request."""
        queue = self.resumable or self.waiting
        if not queue:
            return False
        running = self.running
        return len(running) < model.info.parallel and self._fits(queue[0], running, model)

    def remove(self, request: GenerationRequest) -> bool:
        """Take a request out; return True if the request held memory."""
        queue = self.resumable if self.admitted.pop(request.id, None) else self.waiting
        with suppress(ValueError):
            queue.remove(request)
        return queue is self.resumable

    def clear(self) -> None:
        """Take every request out."""
        self.waiting.clear()
        self.admitted.clear()
        self.resumable.clear()

    def _fits(
        self, request: GenerationRequest, running: list[GenerationRequest], model: LoadedModel
    ) -> bool:
        """Return True if memory suffices even with every request at its maximum length."""
        if not running and request.status is RequestStatus.PREEMPTED:
            # Slow readers of the other preempted requests must not block this one. At worst it
            # exceeds the budget by the memory of one sequence.
            return True
        lengths = [other.max_length for other in (*running, request)]
        # A batch is as wide as its longest row.
        need = len(lengths) * model.kv_bytes(max(lengths))
        # Preempted requests do not grow.
        held = (other.length for other in self.preempted if other is not request)
        return need + sum(map(model.kv_bytes, held)) <= model.info.kv_budget_bytes
