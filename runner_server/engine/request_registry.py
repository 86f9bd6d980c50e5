"""State shared by the event loop and the engine's thread.

Every method is thread-safe. The registry itself refuses requests and commands, so that check and
registration happen under one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from runner_common.units import format_bytes
from runner_server.engine.backend import ModelHandle
from runner_server.engine.commands import Load, ModelCommand
from runner_server.engine.drain import Drain
from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.faults import draining_fault, exiting_fault, stopping_fault
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.health.heartbeat import Heartbeat
from runner_server.engine.health.recent_work import RecentWork
from runner_server.engine.health.retry_estimate import RetryEstimate
from runner_server.engine.request import RequestStatus
from runner_server.engine.types import EngineState, LoadSpec, State
from runner_server.errors import (
    Busy,
    InsufficientMemory,
    ModelNotLoaded,
    QueueFull,
    RunnerFault,
)

_MAX_ERROR_CHARS = 512
"""Limit of the last error's text, because ``Status`` is polled often."""


class RequestRegistry:
    """Registry of the engine's state, model, unfinished requests and pending commands.

    Args:
        max_queued: Most requests that may wait for a slot.
        on_change: Called on any thread after each change of the state, except for steps.

    Attributes:
        heartbeat: Progress of the engine's thread.
    """

    def __init__(self, max_queued: int, on_change: Callable[[], object] = lambda: None) -> None:
        self.heartbeat = Heartbeat()
        self._max_queued = max_queued
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state = State.IDLE
        self._model: ModelHandle | None = None
        self._requests: dict[int, AnyRequest] = {}
        self._model_command: ModelCommand[Any] | None = None
        self._trims: set[Future[None]] = set()
        self._drains: set[Drain] = set()
        self._is_draining = False
        self._retry_estimate = RetryEstimate()
        self._recent = RecentWork()
        self._progress = 0
        self._last_error = ""

    # -- checks of the event loop ------------------------------------------------

    def accept(self, model: ModelHandle, request: AnyRequest) -> None:
        """Register a request.

        Raises:
            ModelNotLoaded: The model that the request was validated for is gone.
            InsufficientMemory: The request could never be admitted.
            QueueFull: Too many requests wait.
            ShuttingDown: The engine is stopping, dead or draining.
        """
        with self._lock:
            if self._require_model() is not model:
                raise ModelNotLoaded
            self._refuse_when_draining()
            _require_memory(model, request)
            parallel = model.info.parallel
            if len(self._requests) >= parallel + self._max_queued:
                queued = self._queued_count()
                raise QueueFull(queued, self._retry_estimate.seconds(queued, parallel))
            self._requests[request.id] = request
        self._on_change()

    def _queued_count(self) -> int:
        waiting = RequestStatus.WAITING
        return sum(request.status is waiting for request in self._requests.values())

    def named(self, request_ids: Collection[str]) -> list[AnyRequest]:
        """Return the unfinished requests whose callers gave them one of these names.

        Raises:
            ShuttingDown: The engine is stopping or dead.
        """
        with self._lock:
            self.refuse_when_ending()
            return [each for each in self._requests.values() if each.request_id in request_ids]

    def begin_drain(self) -> Drain:
        """Refuse new requests, if a model is loaded; return the wait for the accepted ones.

        Raises:
            ShuttingDown: The engine is stopping or dead.
        """
        with self._lock:
            self.refuse_when_ending()
            self._is_draining = self._model is not None
            drain = Drain(self._requests.values())
            self._drains.add(drain)
        self._on_change()
        return drain

    def end_drain(self, drain: Drain, *, is_drained: bool) -> None:
        """Record that a caller no longer waits.

        Args:
            drain: The drain.
            is_drained: False to accept requests again, unless another drain is under way.
        """
        with self._lock:
            self._drains.discard(drain)
            if not (is_drained or self._drains):
                self._is_draining = False
        self._on_change()

    def refuse_when_draining(self) -> None:
        """Raise :class:`ShuttingDown` if new requests are refused because of a drain."""
        with self._lock:
            self._refuse_when_draining()

    def _refuse_when_draining(self) -> None:
        if self._is_draining:
            raise draining_fault()

    def begin_command(self, command: ModelCommand[Any], name: str = "") -> None:
        """Accept a load, or an unload of the model with a name; see :meth:`require_named`.

        Raises:
            Busy: Another load or unload is under way.
            ModelNotLoaded: The name is that of another model.
            ShuttingDown: The engine is stopping or dead.
        """
        with self._lock:
            self._require_idle()
            self._require_named(name)
            self._model_command = command
            if isinstance(command, Load):
                self._progress, self._state = 0, State.LOADING
        self._on_change()

    def begin_trim(self, future: Future[None], name: str = "") -> None:
        """Accept a trim; raise like :meth:`begin_command`."""
        with self._lock:
            self._require_idle()
            self._require_named(name)
            self._trims.add(future)

    def refuse_when_busy(self) -> None:
        """Raise what :meth:`begin_command` would raise at this moment."""
        with self._lock:
            self._require_idle()

    def _require_idle(self) -> None:
        self.refuse_when_ending()
        if self._model_command:
            raise Busy

    def model(self, name: str = "") -> ModelHandle:
        """Return the handle of the loaded model.

        Args:
            name: The name in the call; see :meth:`require_named`.

        Raises:
            ModelNotLoaded: No model is loaded, or another one.
            ShuttingDown: The engine is stopping or dead.
        """
        with self._lock:
            return self._require_model(name)

    def _require_model(self, name: str = "") -> ModelHandle:
        self.refuse_when_ending()
        self._require_named(name)
        if not self._model:
            raise self._not_loaded(name)
        return self._model

    def require_named(self, name: str) -> None:
        """Raise :class:`ModelNotLoaded` unless a name is empty or means the loaded model."""
        with self._lock:
            self._require_named(name)

    def _require_named(self, name: str) -> None:
        if not name:
            return
        if not self._model:
            raise self._not_loaded(name)
        if not self._model.is_named(name):
            raise ModelNotLoaded(wanted=name, loaded=self._model.requested)

    def _not_loaded(self, name: str) -> ModelNotLoaded:
        progress = self._progress if self._state is State.LOADING else None
        return ModelNotLoaded(progress, wanted=name)

    def refuse_when_ending(self) -> None:
        """Raise :class:`ShuttingDown` if the engine is stopping or dead."""
        if self._state is State.STOPPING:
            raise stopping_fault()
        if self._state is State.FAILED:
            raise exiting_fault()

    @property
    def is_stopping(self) -> bool:
        """True if the engine is stopping or dead."""
        return self._state in (State.STOPPING, State.FAILED)

    def state(self) -> EngineState:
        """Return a snapshot of the engine's state."""
        with self._lock:
            # A failed engine runs no requests, even if its thread hangs and still has some.
            requests = [] if self._state is State.FAILED else [*self._requests.values()]
            count = len(requests)
            queued = self._queued_count() if count else 0
            is_working = count > 0 and not self.heartbeat.is_idle
            is_active = is_working or self._state is State.LOADING
            is_draining = self._is_draining and self._state is State.ACTIVE
            return EngineState(
                state=State.DRAINING if is_draining else self._state,
                progress=self._progress,
                model=self._model.info if self._model else None,
                running_count=count - queued,
                queued_count=queued,
                step_count=self.heartbeat.step_count,
                last_progress_age=self.heartbeat.age() if is_active else None,
                last_error=self._last_error,
                kv_token_count=sum(each.kv_token_count for each in requests),
                kv_token_capacity=_kv_token_capacity(self._model) if self._model else 0,
                prefix_cached_ratio=self._recent.cached_ratio if self._model else 0.0,
                tokens_per_second=self._recent.tokens_per_second if self._model else 0.0,
            )

    # -- reports of the engine's thread ------------------------------------------

    def note_progress(self, progress: int) -> None:
        """Record the progress of a load, 0 to 100."""
        self._progress = progress
        self.heartbeat.beat()
        self._on_change()

    def note_admission(self) -> None:
        """Record that a request has left the queue for a slot."""
        # So that the age of the last progress in Status excludes the preceding idle time.
        self.heartbeat.beat()
        self._on_change()

    def note_error(self, text: str) -> None:
        """Record why a load or a step failed."""
        self._last_error = text[:_MAX_ERROR_CHARS]
        self._on_change()

    def note_failed_load(self, spec: LoadSpec, fault: RunnerFault) -> None:
        """Record why a load failed or was refused."""
        self.note_error(f"load of {spec.model!r} failed: {fault}")

    def note_step(self, generated: int) -> None:
        """Record a finished work item and the number of tokens that it generated."""
        self.heartbeat.step()
        if generated:
            self._recent.note_generated(generated)

    def note_first_token(self, request: GenerationRequest) -> None:
        """Record how much of a request's prompt came from the prefix cache."""
        stats = request.stats()
        self._recent.note_prompt(stats.prompt_count, stats.cached_count)

    def remove(
        self,
        request: AnyRequest,
        running_seconds: float | None = None,
    ) -> None:
        """Remove a finished request.

        Args:
            request: The request.
            running_seconds: Time that it occupied a slot; None if it had none, was cancelled or
                failed.
        """
        with self._lock:
            self._requests.pop(request.id, None)
            for drain in self._drains:
                drain.note_end(request.id)
            if running_seconds is not None:
                parallel = self._model.info.parallel if self._model else 1
                self._retry_estimate.record(running_seconds, parallel)
        self._on_change()

    def offer_model(self, model: ModelHandle) -> None:
        """Start accepting requests for a model."""
        with self._lock:
            self._model, self._recent = model, RecentWork()
        self._on_change()

    def withdraw_model(self) -> list[AnyRequest]:
        """Stop accepting requests; return the unfinished ones."""
        with self._lock:
            self._model = None
            self._is_draining = False
            self._progress = 0
            requests = list(self._requests.values())
        self._on_change()
        return requests

    def end_command(self) -> None:
        """Record the end of a load or an unload, so that the next one can begin."""
        with self._lock:
            self._model_command = None
            if not self.is_stopping:
                self._state = State.ACTIVE if self._model else State.IDLE
            self._progress = 100 if self._model else 0
        self._on_change()

    def end_trim(self, future: Future[None]) -> None:
        """Record the end of a trim. No-op if the caller has cancelled it."""
        with self._lock:
            self._trims.discard(future)
        with suppress(InvalidStateError):
            future.set_result(None)

    # -- the end -----------------------------------------------------------------

    def stop(self) -> None:
        """Refuse further calls because the engine is stopping."""
        with self._lock:
            if self._state is not State.FAILED:
                self._state = State.STOPPING
            self._fail_drains(stopping_fault())
        self._on_change()

    def die(self, text: str) -> list[AnyRequest]:
        """Refuse further calls because the engine is dead; return the unfinished requests."""
        with self._lock:
            self._state, self._last_error = State.FAILED, text[:_MAX_ERROR_CHARS]
            self._fail_drains(exiting_fault())
        return self.withdraw_model()

    def _fail_drains(self, fault: RunnerFault) -> None:
        for drain in self._drains:
            drain.fail(fault)

    def fail_commands(self, fault: RunnerFault) -> None:
        """Fail the pending load or unload and the pending trims."""
        with self._lock:
            command, self._model_command = self._model_command, None
            trims, self._trims = self._trims, set()
        futures: list[Future[Any]] = [command.future] if command else []
        for future in (*futures, *trims):
            # The caller may have cancelled, or the engine's thread may have set the outcome.
            with suppress(InvalidStateError):
                future.set_exception(fault)


def _kv_token_capacity(model: ModelHandle) -> int:
    """Return the most tokens that fit the KV budget in sequences of equal length.

    Counted in sequences of full length, of which a share may fit too: there a window or a recurrent
    state takes the least memory per token.
    """
    info = model.info
    fitting = info.kv_budget_bytes / max(1, model.kv_bytes(info.context_length))
    return int(min(info.parallel, fitting) * info.context_length)


def _require_memory(model: ModelHandle, request: AnyRequest) -> None:
    """Refuse a request whose KV cache would not fit even alone."""
    need, budget = model.kv_bytes(request.max_length), model.info.kv_budget_bytes
    if need > budget:
        advice = (
            "split the text"
            if isinstance(request, EmbeddingRequest)
            else "request fewer with num_predict"
        )
        raise InsufficientMemory(
            f"{request.max_length} tokens need {format_bytes(need)} of KV cache and "
            f"{format_bytes(budget)} may be used; {advice}, or load with more memory",
            requiredBytes=need,
            availableBytes=budget,
        )
