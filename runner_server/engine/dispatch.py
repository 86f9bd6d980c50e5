"""Passing of events to their requests, and of their output to the readers."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.embedding.types import Embedded
from runner_server.engine.faults import row_fault, vector_fault
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.output.base import Channel
from runner_server.engine.output.wakeups import WakeupCoalescer
from runner_server.engine.request import RequestStatus
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.scheduler import Scheduler
from runner_server.engine.types import Event, NoLegalToken, NotFinite, Prefill, Token
from runner_server.errors import InvalidField, RunnerFault

logger = logging.getLogger(__name__)


class EventDispatcher:
    """Passes the events of work items to their requests. Belongs to the engine's thread.

    Args:
        scheduler: Knows the admitted requests.
        registry: Is told about requests that end.
        wakeups: Wakes the readers.
    """

    def __init__(
        self, scheduler: Scheduler, registry: RequestRegistry, wakeups: WakeupCoalescer
    ) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._wakeups = wakeups
        self._updated: list[Channel] = []
        self._urgent: list[Channel] = []

    def dispatch(self, events: Iterable[Event], dtype: str) -> list[int]:
        """Pass the events of a work item to their requests, and count the item and its tokens.

        Args:
            events: The events. Those of a draft may go on after the token that ends the text.
            dtype: Format of the weights in memory, for the messages of failures.

        Returns:
            The rows whose requests have ended, which the caller removes from the executor.
        """
        ended, tokens = [], 0
        for event in events:
            # None if the request has ended, by an earlier event or by its reader.
            if request := self._scheduler.embedding.get(event.row):
                is_over = self._on_texts(request, event, dtype)
            elif generation := self._scheduler.admitted.get(event.row):
                tokens += isinstance(event, Token)
                is_over = self._on_row(generation, event, dtype)
            else:
                continue
            if is_over:
                ended.append(event.row)
        self._registry.note_step(tokens)
        return ended

    def fail(self, requests: Iterable[AnyRequest], fault: RunnerFault) -> None:
        """End requests with a fault."""
        for request in requests:
            self._scheduler.remove(request)
            self._registry.remove(request)
            request.fail(fault)
            self._urgent.append(request.stream)

    def publish(self) -> None:
        """Schedule wakeups of the readers with new output."""
        if self._updated or self._urgent:
            self._wakeups.publish(self._updated, self._urgent)
            self._updated, self._urgent = [], []

    def _on_texts(self, request: EmbeddingRequest, event: Event, dtype: str) -> bool:
        """Pass an event to a request to embed; return True if the request has ended."""
        if isinstance(event, Prefill):
            request.on_prefill(event)
            return False
        if not isinstance(event, Embedded):
            fault = vector_fault(dtype)
            self._note_failure(request.id, fault, "an embedding failed: a vector is not finite")
            self.fail([request], fault)
            return True
        if not request.on_vector(event):
            return False
        self._scheduler.remove(request)
        self._registry.remove(request)
        self._urgent.append(request.stream)
        return True

    def _on_row(self, request: GenerationRequest, event: Event, dtype: str) -> bool:
        """Pass an event to a generation; return True if the generation has ended."""
        if isinstance(event, NotFinite | NoLegalToken):
            fault = row_fault(event, request.length, dtype)
            # A constraint that cannot be met is not an error of the runner.
            if not isinstance(fault, InvalidField):
                self._note_failure(request.id, fault, "a completion failed: logits are not finite")
            self.fail([request], fault)
            return True
        if isinstance(event, Prefill):
            request.on_prefill(event)
            if event.prefilled < event.total - 1:
                # The end of a prefill is merged with the first token, which follows at once.
                self._updated.append(request.stream)
            return False
        if isinstance(event, Token):
            return self._on_token(request, event)
        raise RuntimeError(f"a generation got a vector: row {event.row}")

    def _on_token(self, request: GenerationRequest, event: Token) -> bool:
        self._updated.append(request.stream)
        is_first = request.status is RequestStatus.PREFILLING
        result = request.on_token(event)
        if is_first:
            self._registry.note_first_token(request)
        if is_first or result:
            self._urgent.append(request.stream)
        if result is None:
            return False
        self._scheduler.remove(request)
        self._registry.remove(request, request.running_seconds(result))
        return True

    def _note_failure(self, row: int, fault: RunnerFault, text: str) -> None:
        self._registry.note_error(text)
        logger.error("row %d failed: %s", row, fault)
