"""The one thread that owns the model: it loads, admits, steps, publishes.

The public methods are called on the event loop and only pass messages; each
private method says nothing about threads because all of them run on the engine's
own. :meth:`Engine._run` is the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from runner_server.backend import Backend, Batch, LoadedModel, ModelHandle
from runner_server.completion import Completion
from runner_server.errors import (
    Busy,
    GenerationFailed,
    ModelNotLoaded,
    QueueFull,
    RunnerFault,
    ShuttingDown,
)
from runner_server.messages import (
    CompletionSpec,
    Done,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    Prefill,
    Snapshot,
    State,
    Token,
)
from runner_server.stream import Stream

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 2
"""Failed steps in a row after which the engine gives up: it cannot recover in place."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class _Cancel:
    completion: int


@dataclass(frozen=True)
class _Wake:
    """Nothing but a reason to look at the flags."""


@dataclass(eq=False)
class Ticket(Generic[_T]):
    """A load or an unload under way.

    Attributes:
        work: What the engine's thread does for it.
        future: Ends with the outcome of the work, or with a fault.
        cancelled: Set when nobody waits for it any more.
    """

    work: Callable[[Ticket[_T]], _T]
    future: Future[_T] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


_Message = Completion | Ticket[Any] | _Cancel | _Wake


class Engine:
    """Runs one model on a thread of its own.

    Args:
        backend: The model library.
        max_queued: How many completions may wait for a place.
        on_death: Called on the loop, once, if the engine cannot go on.

    Must be created on the running event loop.
    """

    def __init__(self, backend: Backend, *, max_queued: int, on_death: Callable[[], None]) -> None:
        self._backend = backend
        self._max_queued = max_queued
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        # Guards what both sides change: _state, _handle, _live and _ticket.
        self._lock = threading.Lock()
        self._state = State.IDLE
        self._handle: ModelHandle | None = None
        self._live: dict[int, Completion] = {}
        self._ticket: Ticket[Any] | None = None
        # The engine thread's own; the loop only reads numbers of it. Nobody else may
        # hold the model, or its memory would not come back.
        self._model: LoadedModel | None = None
        self._batch: Batch | None = None
        self._waiting: deque[Completion] = deque()
        self._running: dict[int, Completion] = {}
        self._touched: list[Stream] = []
        self._failed_steps = 0
        self._mean_seconds = 1.0
        self._progress = 0
        self._steps = 0
        self._moved = time.monotonic()
        self._last_error = ""
        self.device = ""

    # -- called on the event loop ------------------------------------------------

    def start(self) -> None:
        """Starts the thread, which imports the model library first."""
        self._thread.start()

    def load(self, spec: LoadSpec) -> Ticket[ModelInfo]:
        """Begins a load.

        Raises:
            Busy: Another load or unload runs.
            ShuttingDown: The engine stops.
        """
        ticket = Ticket(lambda ticket: self._load(spec, ticket))
        self._open_ticket(ticket, State.LOADING)
        return ticket

    def unload(self) -> Ticket[int]:
        """Begins an unload, which ends with the bytes freed; raises like :meth:`load`."""
        ticket = Ticket(lambda _: self._unload())
        self._open_ticket(ticket, None)
        return ticket

    def model(self) -> ModelHandle:
        """The loaded model's description and tokenizer.

        Raises:
            ModelNotLoaded: There is none.
            ShuttingDown: The engine stops.
        """
        with self._lock:
            return self._require_model()

    def submit(self, model: ModelHandle, spec: CompletionSpec) -> Completion:
        """Queues a completion.

        Args:
            model: The model that ``spec`` was validated for.
            spec: What to complete.

        Raises:
            ModelNotLoaded: That model is gone.
            QueueFull: Too many completions wait.
            ShuttingDown: The engine stops.
        """
        completion = Completion(spec, model.codec, model.info.eos_token_ids)
        with self._lock:
            if self._require_model() is not model:
                raise ModelNotLoaded
            queued = len(self._live) - len(self._running)
            if len(self._live) >= model.info.parallel + self._max_queued:
                raise QueueFull(queued, self._retry_seconds(queued, model.info.parallel))
            self._live[completion.id] = completion
        self._inbox.put(completion)
        return completion

    def cancel(self, completion: Completion) -> None:
        """Ends a completion that nobody reads any more; nothing happens if it has ended."""
        if completion.id in self._live:
            self._inbox.put(_Cancel(completion.id))

    def snapshot(self) -> Snapshot:
        """What the engine does, without waiting for it."""
        with self._lock:
            state, handle, live = self._state, self._handle, len(self._live)
        running = min(len(self._running), live)
        active = live > 0 or state is State.LOADING
        return Snapshot(
            state=state,
            progress=self._progress,
            model=handle.info if handle else None,
            running_count=running,
            queued_count=live - running,
            step_count=self._steps,
            last_progress_age=time.monotonic() - self._moved if active else None,
            last_error=self._last_error,
        )

    def memory(self) -> MemoryCounters:
        """What the model library holds."""
        return self._backend.memory()

    def stop(self) -> None:
        """Ends all completions, frees the model and ends the thread; does not wait."""
        with self._lock:
            if self._state is not State.FAILED:
                self._state = State.STOPPING
        self._inbox.put(_Wake())

    def join(self, timeout: float) -> bool:
        """Waits for the thread, for ``timeout`` seconds; returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _open_ticket(self, ticket: Ticket[Any], state: State | None) -> None:
        with self._lock:
            self._refuse_when_ending()
            if self._ticket:
                raise Busy
            self._ticket = ticket
            # Visible in Status from now on, not from when the thread gets to it.
            if state:
                self._progress, self._state = 0, state
        self._inbox.put(ticket)

    def _require_model(self) -> ModelHandle:
        self._refuse_when_ending()
        if not self._handle:
            raise ModelNotLoaded
        return self._handle

    def _refuse_when_ending(self) -> None:
        if self._state is State.STOPPING:
            raise ShuttingDown("the runner is stopping; use another")
        if self._state is State.FAILED:
            raise GenerationFailed("the engine has failed and the runner is exiting; use another")

    def _retry_seconds(self, queued: int, parallel: int) -> float:
        """When a place should be free: the queue's length at the measured pace."""
        return min(60.0, max(0.1, self._mean_seconds * queued / parallel))

    # -- the engine's thread -----------------------------------------------------

    def _run(self) -> None:
        try:
            self.device = self._backend.open()
            while self._state is not State.STOPPING:
                self._take_messages()
                self._advance()
                self._publish()
            stopping = ShuttingDown("the runner is stopping; use another")
            self._end_all(stopping)
            self._fail_ticket(stopping)
            self._free_model()
            self._backend.close()
        except BaseException as error:  # noqa: BLE001 - a dead thread must not look alive
            self._die(error)

    def _take_messages(self) -> None:
        """Handles what has come; waits for it only when there is nothing else to do."""
        idle = not self._running and not self._waiting
        message = self._inbox.get() if idle else self._poll()
        while message is not None:
            self._receive(message)
            message = self._poll()

    def _poll(self) -> _Message | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _receive(self, message: _Message) -> None:
        match message:
            case Completion() if message.id in self._live:
                self._waiting.append(message)
            case _Cancel(completion=id_):
                self._drop(id_)
            case Ticket():
                self._settle(message)

    def _advance(self) -> None:
        """Admits what fits and makes one step; recovers once if that raises."""
        model, batch = self._model, self._batch
        if not (model and batch):
            return
        try:
            self._admit(batch, model.info.parallel)
            if self._running:
                self._step(batch)
                self._failed_steps = 0
        except Exception as error:  # noqa: BLE001 - whatever MLX raised, its rows are lost
            self._recover(error)
            batch.close()
            self._batch = model.new_batch()

    def _admit(self, batch: Batch, parallel: int) -> None:
        while self._waiting and len(self._running) < parallel:
            completion = self._waiting.popleft()
            completion.admit()
            self._running[completion.id] = completion
            batch.add(completion.id, completion.spec.prompt_ids, completion.spec.sampling)

    def _step(self, batch: Batch) -> None:
        events = batch.step()
        self._steps += 1
        self._moved = time.monotonic()
        ended = [row for event in events if (row := self._on_event(event)) is not None]
        if ended:
            batch.remove(ended)

    def _on_event(self, event: Prefill | Token) -> int | None:
        """Passes an event on; returns its row if that has ended."""
        completion = self._running.get(event.row)
        if completion is None:
            return None
        self._touched.append(completion.stream)
        if isinstance(event, Prefill):
            completion.on_prefill(event)
            return None
        done = completion.on_token(event)
        if done is None:
            return None
        self._note_end(completion, done)
        return completion.id

    def _note_end(self, completion: Completion, done: Done) -> None:
        seconds = done.prompt_seconds + done.eval_seconds
        self._mean_seconds = 0.8 * self._mean_seconds + 0.2 * seconds
        self._forget(completion)
        logger.info(
            "completion %d %r: %s, %d prompt tokens in %.3f s, %d generated in %.3f s, "
            "queued %.3f s",
            completion.id,
            completion.spec.request_id,
            done.reason.value,
            done.prompt_count,
            done.prompt_seconds,
            done.eval_count,
            done.eval_seconds,
            done.queue_seconds,
        )

    def _drop(self, id_: int) -> None:
        """Ends a cancelled completion in whatever phase it is."""
        completion = self._live.get(id_)
        if completion is None:
            return
        if id_ in self._running and self._batch:
            self._batch.remove([id_])
        else:
            self._waiting.remove(completion)
        self._forget(completion)

    def _forget(self, completion: Completion) -> None:
        with self._lock:
            self._running.pop(completion.id, None)
            self._live.pop(completion.id, None)

    def _fail(self, completions: list[Completion], fault: RunnerFault) -> None:
        for completion in completions:
            completion.fail(fault)
            self._touched.append(completion.stream)
            self._forget(completion)

    def _publish(self) -> None:
        """Wakes every reader that has something new, in one call of the loop."""
        if self._touched:
            touched, self._touched = self._touched, []
            self._loop.call_soon_threadsafe(_wake, touched)

    def _recover(self, error: Exception) -> None:
        """Ends the rows of the batch; a second time in a row the engine gives up."""
        self._failed_steps += 1
        self._last_error = f"a step failed: {type(error).__name__}"
        logger.error("step failed with %d rows", len(self._running), exc_info=error)
        self._fail(
            list(self._running.values()),
            GenerationFailed(
                f"MLX raised {type(error).__name__} in a step of this batch; the runner's log has "
                "the traceback; the request may be retried"
            ),
        )
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise RuntimeError(f"{self._failed_steps} steps in a row failed") from error

    def _settle(self, ticket: Ticket[Any]) -> None:
        """Runs a load or unload and hands its outcome to whoever waits."""
        if not ticket.future.set_running_or_notify_cancel():
            self._close_ticket()
            return
        try:
            result = ticket.work(ticket)
        except RunnerFault as fault:
            self._close_ticket()
            ticket.future.set_exception(fault)
        else:
            self._close_ticket()
            ticket.future.set_result(result)

    def _close_ticket(self) -> None:
        with self._lock:
            self._ticket = None
            if self._state is not State.STOPPING:
                self._state = State.ACTIVE if self._handle else State.IDLE
        self._progress = 100 if self._model else 0

    def _load(self, spec: LoadSpec, ticket: Ticket[ModelInfo]) -> ModelInfo:
        self._end_all(ShuttingDown("the model is being replaced; load or use another runner"))
        self._free_model()

        def report(progress: int) -> None:
            self._progress, self._moved = progress, time.monotonic()
            self._publish()
            if ticket.cancelled.is_set() or self._state is State.STOPPING:
                raise ShuttingDown("the load was cancelled")

        try:
            report(0)
            self._model = self._backend.load(spec, report)
            self._batch = self._model.new_batch()
        except Exception as error:  # noqa: BLE001 - a model that fails must not end the process
            fault = _load_fault(spec, error)
            self._last_error = f"load of {spec.model} failed: {fault}"
            self._free_model()
            raise fault from None
        with self._lock:
            self._handle = ModelHandle(self._model.info, self._model.codec)
        return self._model.info

    def _unload(self) -> int:
        before = self._held_bytes()
        self._end_all(ShuttingDown("the model was unloaded; load or use another runner"))
        self._free_model()
        return max(0, before - self._held_bytes())

    def _held_bytes(self) -> int:
        memory = self._backend.memory()
        return memory.active_bytes + memory.cache_bytes

    def _end_all(self, fault: RunnerFault) -> None:
        # Without a model no new completion is accepted, so the list is final.
        with self._lock:
            self._handle = None
            completions = list(self._live.values())
        self._waiting.clear()
        self._fail(completions, fault)
        self._publish()

    def _free_model(self) -> None:
        if self._batch:
            self._batch.close()
        self._batch = self._model = None
        self._backend.release()

    def _fail_ticket(self, fault: RunnerFault) -> None:
        with self._lock:
            ticket, self._ticket = self._ticket, None
        if ticket and not ticket.future.done():
            ticket.future.set_exception(fault)

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine is dead; the process exits", exc_info=error)
        self._last_error = f"the engine failed: {type(error).__name__}: {error}"
        with self._lock:
            self._state, self._handle = State.FAILED, None
            completions = list(self._live.values())
        fault = GenerationFailed("the engine has failed and the runner is exiting; use another")
        self._fail(completions, fault)
        self._publish()
        self._fail_ticket(fault)
        self._loop.call_soon_threadsafe(self._on_death)


def _load_fault(spec: LoadSpec, error: Exception) -> RunnerFault:
    """Logs why a load failed, and lets go of it: tracebacks hold arrays that were read."""
    logger.warning("load of %s failed", spec.model, exc_info=error)
    fault = (
        error
        if isinstance(error, RunnerFault)
        else GenerationFailed(
            f"loading {spec.model} raised {type(error).__name__}; the runner's log has the "
            "traceback"
        )
    )
    fault.__cause__ = fault.__context__ = fault.__traceback__ = error.__traceback__ = None
    return fault


def _wake(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake()
