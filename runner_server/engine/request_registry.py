"""What the engine has accepted: the book that the event loop and the engine's thread share.

Every method may be called from both sides. Refusals are made here, so that the
decision and the entry happen under one lock.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from runner_common.units import format_bytes
from runner_server.engine.backend import ModelHandle
from runner_server.engine.commands import Load, ModelCommand
from runner_server.engine.generation_request import GenerationRequest, RequestStatus
from runner_server.engine.types import EngineState, State
from runner_server.errors import (
    Busy,
    InsufficientMemory,
    ModelNotLoaded,
    QueueFull,
    RunnerFault,
    ShuttingDown,
)

_MAX_ERROR_CHARS = 512
"""Of the last error: Status is asked often."""

_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.1, 60.0
_NEWEST_WEIGHT = 0.2
"""Share of the latest batch in the moving average of how long a completion takes. Rows that
run together end together: a batch that was held up is one thing seen, not many."""


class RequestRegistry:
    """State, model, completions and the ticket of one engine.

    Args:
        max_queued: How many completions may wait for a place.
    """

    def __init__(self, max_queued: int) -> None:
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._state = State.IDLE
        self._handle: ModelHandle | None = None
        self._requests: dict[int, GenerationRequest] = {}
        self._model_command: ModelCommand[Any] | None = None
        self._trims: set[Future[None]] = set()
        self._mean_seconds = 1.0
        self._ended = 0
        self._progress = 0
        self._steps = 0
        self._moved = time.monotonic()
        self._is_idle = True
        self._last_error = ""

    # -- refusing and accepting --------------------------------------------------

    def accept(self, model: ModelHandle, request: GenerationRequest) -> None:
        """Enters a completion.

        Raises:
            ModelNotLoaded: The model it was validated for is gone.
            InsufficientMemory: It could never have a place.
            QueueFull: Too many completions wait.
            ShuttingDown: The engine stops, or is dead.
        """
        with self._lock:
            if self._require_model() is not model:
                raise ModelNotLoaded
            _require_memory(model, request)
            if len(self._requests) >= model.info.parallel + self._max_queued:
                queued = self._queued_count()
                raise QueueFull(queued, self._retry_seconds(queued, model.info.parallel))
            self._requests[request.id] = request

    def _queued_count(self) -> int:
        waiting = RequestStatus.WAITING
        return sum(request.status is waiting for request in self._requests.values())

    def begin_command(self, command: ModelCommand[Any]) -> None:
        """Accept a load or an unload.

        Raises:
            Busy: Another load or unload is under way.
            ShuttingDown: The engine is stopping or dead.
        """
        with self._lock:
            self._refuse_when_busy()
            self._model_command = command
            if isinstance(command, Load):
                self._progress, self._state = 0, State.LOADING

    def begin_trim(self, future: Future[None]) -> None:
        """Accept a trim; raise like :meth:`begin_command`."""
        with self._lock:
            self._refuse_when_busy()
            self._trims.add(future)

    def _refuse_when_busy(self) -> None:
        self.refuse_when_ending()
        if self._model_command:
            raise Busy

    def model(self) -> ModelHandle:
        """The loaded model's description and tokenizer; raises like :meth:`accept`."""
        with self._lock:
            return self._require_model()

    def _require_model(self) -> ModelHandle:
        self.refuse_when_ending()
        if not self._handle:
            raise ModelNotLoaded
        return self._handle

    def refuse_when_ending(self) -> None:
        """Raise :class:`ShuttingDown` if the engine stops, or is dead."""
        if self._state is State.STOPPING:
            raise stopping_fault()
        if self._state is State.FAILED:
            raise exiting_fault()

    def _retry_seconds(self, queued: int, parallel: int) -> float:
        """When a place should be free: the queue's length at the measured pace."""
        expected = self._mean_seconds * queued / parallel
        return min(_MAX_RETRY_SECONDS, max(_MIN_RETRY_SECONDS, expected))

    # -- looking -----------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        """Whether the engine was asked to stop, or is dead."""
        return self._state in (State.STOPPING, State.FAILED)

    def state(self) -> EngineState:
        """What the engine does, without waiting for it."""
        with self._lock:
            # A failed engine runs nothing, even if its thread hangs and keeps its requests.
            count = 0 if self._state is State.FAILED else len(self._requests)
            queued = self._queued_count() if count else 0
            active = (count > 0 and not self._is_idle) or self._state is State.LOADING
            return EngineState(
                state=self._state,
                progress=self._progress,
                model=self._handle.info if self._handle else None,
                running_count=count - queued,
                queued_count=queued,
                step_count=self._steps,
                last_progress_age=time.monotonic() - self._moved if active else None,
                last_error=self._last_error,
            )

    # -- what the engine's thread reports ----------------------------------------

    def note_progress(self, progress: int) -> None:
        """A load has moved; 0 to 100."""
        self._progress, self._moved = progress, time.monotonic()

    def note_idle(self, *, is_idle: bool) -> None:
        """Nothing can be done until something comes, or it has come.

        Completions whose readers are behind are live then, but nothing is to move.
        """
        self._is_idle = is_idle
        self._moved = time.monotonic()

    def note_step(self) -> None:
        """A step was made."""
        self._steps += 1
        self._moved = time.monotonic()

    def note_error(self, text: str) -> None:
        """A load or a step has failed, in words."""
        self._last_error = text[:_MAX_ERROR_CHARS]

    def note_admission(self) -> None:
        """Record that a request was admitted, so that Status shows the age of its work."""
        self._moved = time.monotonic()

    def remove(self, request: GenerationRequest, running_seconds: float | None = None) -> None:
        """Forget a finished request.

        Args:
            request: The request.
            running_seconds: How long it held a slot, if it was neither cancelled nor failed.
        """
        with self._lock:
            self._requests.pop(request.id, None)
            if running_seconds is not None:
                self._note_pace(running_seconds)

    def _note_pace(self, seconds: float) -> None:
        """Enters how long a completion had its place; the first one replaces the guess."""
        self._ended += 1
        parallel = self._handle.info.parallel if self._handle else 1
        weight = max(_NEWEST_WEIGHT / parallel, 1 / self._ended)
        self._mean_seconds += weight * (seconds - self._mean_seconds)

    def offer_model(self, handle: ModelHandle) -> None:
        """A model is loaded: completions are accepted from now on."""
        with self._lock:
            self._handle = handle

    def withdraw_model(self) -> list[GenerationRequest]:
        """No completion is accepted any more; returns those that have not ended."""
        with self._lock:
            self._handle = None
            self._progress = 0
            return list(self._requests.values())

    def end_command(self) -> None:
        """Make way for the next load or unload."""
        with self._lock:
            self._model_command = None
            if not self.is_stopping:
                self._state = State.ACTIVE if self._handle else State.IDLE
            self._progress = 100 if self._handle else 0

    def end_trim(self, future: Future[None]) -> None:
        """End a trim. No-op if its caller has given it up."""
        with self._lock:
            self._trims.discard(future)
        with suppress(InvalidStateError):
            future.set_result(None)

    def fail_commands(self, fault: RunnerFault) -> None:
        """Fail the load or unload and the trims that are under way."""
        with self._lock:
            command, self._model_command = self._model_command, None
            trims, self._trims = self._trims, set()
        futures: list[Future[Any]] = [command.future] if command else []
        for future in (*futures, *trims):
            # A caller may give up at the same moment.
            with suppress(InvalidStateError):
                future.set_exception(fault)

    # -- the end -----------------------------------------------------------------

    def stop(self) -> None:
        """Nothing is accepted any more, because the engine stops."""
        with self._lock:
            if self._state is not State.FAILED:
                self._state = State.STOPPING

    def die(self, text: str) -> list[GenerationRequest]:
        """Nothing is accepted any more, because the engine is dead; like :meth:`withdraw_model`."""
        with self._lock:
            self._state, self._last_error = State.FAILED, text[:_MAX_ERROR_CHARS]
        return self.withdraw_model()


def _require_memory(model: ModelHandle, request: GenerationRequest) -> None:
    """Refuse a request whose KV cache would not fit even alone."""
    need, budget = model.kv_bytes(request.max_length), model.info.kv_budget_bytes
    if need > budget:
        raise InsufficientMemory(
            f"{request.max_length} tokens need {format_bytes(need)} of KV cache and "
            f"{format_bytes(budget)} may be used; ask for fewer with num_predict, or load with "
            "more memory",
            requiredBytes=need,
            availableBytes=budget,
        )


def stopping_fault() -> ShuttingDown:
    """What calls get while the process stops."""
    return ShuttingDown("the runner is stopping; use another")


def exiting_fault() -> ShuttingDown:
    """What new calls get once the engine is dead."""
    return ShuttingDown("the engine has failed and the runner is exiting; use another")
