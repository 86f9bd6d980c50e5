"""The engine's thread, which owns the model. :meth:`EngineThread.run` is its loop.

Everything in this module runs on that thread: it takes commands from a queue and replies through
output channels, futures and the registry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from functools import partial
from typing import TypeVar, assert_never

from runner_server.engine.backend import Backend, BackendLost, Executor, LoadedModel, ModelHandle
from runner_server.engine.commands import (
    Cancel,
    Command,
    CommandQueue,
    LimitPrefixCache,
    Load,
    ModelCommand,
    Resume,
    Stop,
    Trim,
    Unload,
)
from runner_server.engine.dispatch import EventDispatcher
from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.faults import (
    death_faults,
    load_fault,
    step_fault,
    stopping_fault,
)
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.output.wakeups import WakeupCoalescer, call_on_loop
from runner_server.engine.request import RequestStatus
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.scheduler import Scheduler
from runner_server.engine.types import LoadSpec, ModelInfo
from runner_server.engine.work import DecodeItem, WorkItem
from runner_server.errors import InvalidField, RunnerFault, ShuttingDown

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

_TRIM_AFTER_SECONDS = 1.0
"""Idle time after which the engine returns freed memory to the system."""

_MAX_FAILED_STEPS = 2
"""Failed steps, with no successful decode step between them, after which the engine dies: it
evidently cannot recover."""


class EngineThread:
    """The engine's loop: take commands, ask the scheduler, run a work item, publish.

    Args:
        backend: The model library.
        registry: The state shared with the event loop.
        commands: The queue of commands.
        loop: The event loop on which readers are woken and ``on_death`` is called.
        on_death: Called once if the engine cannot continue.
        max_draft: Most tokens to draft for a request that is alone in the batch; 0 drafts none.

    Attributes:
        device: Name of the device; empty until the library is imported.
    """

    def __init__(
        self,
        backend: Backend,
        registry: RequestRegistry,
        commands: CommandQueue,
        loop: asyncio.AbstractEventLoop,
        on_death: Callable[[], None],
        max_draft: int,
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._commands = commands
        self._loop = loop
        self._on_death = on_death
        # The only references to the model, so that dropping them frees its memory.
        self._model: LoadedModel | None = None
        self._executor: Executor | None = None
        self._max_draft = max_draft
        self._scheduler = Scheduler(max_draft)
        self._dispatcher = EventDispatcher(self._scheduler, registry, WakeupCoalescer(loop))
        self._failed_steps = 0
        self._has_stepped = False
        self._prefix_cache_bytes = 0
        self.device = ""

    def run(self) -> None:
        """Run until the registry is stopping or the engine cannot continue."""
        try:
            self.device = self._backend.open()
            while not self._registry.is_stopping:
                self._take_commands()
                self._dispatcher.publish()
                self._guarded(self._admit_and_run)
                self._dispatcher.publish()
            self._close()
        except BaseException as error:  # noqa: BLE001 - a dead thread must not look alive
            self._die(error)

    # -- commands ----------------------------------------------------------------

    def _take_commands(self) -> None:
        """Handle the queued commands; block only if there is no work to do."""
        command = self._commands.poll() if self._can_advance() else self._wait()
        while command is not None:
            self._handle(command)
            command = self._commands.poll()

    def _can_advance(self) -> bool:
        if self._scheduler.has_running:
            return True
        return self._model is not None and self._scheduler.has_next(self._model)

    def _wait(self) -> Command:
        self._registry.heartbeat.set_idle(is_idle=True)
        command = self._wait_or_trim()
        self._registry.heartbeat.set_idle(is_idle=False)
        return command

    def _wait_or_trim(self) -> Command:
        """Block until a command arrives; write prefixes, and after a second return freed memory."""
        while self._model and self._model.save_prefixes(is_idle=True):
            if command := self._commands.poll():
                return command
        if self._has_stepped:
            if command := self._commands.poll(_TRIM_AFTER_SECONDS):
                return command
            self._has_stepped = False
            self._backend.trim()
        return self._commands.get()

    def _handle(self, command: Command) -> None:
        match command:
            case GenerationRequest() | EmbeddingRequest():
                # FINISHED if its model was replaced or unloaded while it was in the queue.
                if command.status is RequestStatus.WAITING:
                    self._scheduler.add(command)
            case Cancel(request):
                self._cancel(request)
            case Resume(request_id):
                self._scheduler.mark_resumable(request_id)
            case LimitPrefixCache(limit_bytes):
                self._limit_prefix_cache(limit_bytes)
            case Trim():
                self._trim(command)
            case Load():
                self._change_model(command, partial(self._load, command))
            case Unload():
                self._change_model(command, self._unload)
            case Stop():
                # The loop and a running load read the registry's state.
                pass
            case _:
                assert_never(command)

    def _limit_prefix_cache(self, limit_bytes: int) -> None:
        if self._model:
            self._prefix_cache_bytes = limit_bytes
            self._model.limit_prefix_cache(limit_bytes)

    def _trim(self, trim: Trim) -> None:
        """Evict from the prefix cache without changing its budget, and return freed memory."""
        if self._model:
            self._model.limit_prefix_cache(min(self._prefix_cache_bytes, trim.prefix_cache_bytes))
            self._model.limit_prefix_cache(self._prefix_cache_bytes)
        self._backend.trim()
        self._registry.end_trim(trim.future)

    def _cancel(self, request: AnyRequest) -> None:
        """Finish a request whose reader is gone. No-op once finished."""
        if request.status is RequestStatus.FINISHED:
            return
        self._registry.remove(request)
        holds_memory = self._scheduler.remove(request)
        request.cancel()
        if holds_memory:
            self._guarded(lambda _model, executor: executor.remove([request.id]))

    # -- requests -------------------------------------------------------------

    def _guarded(self, work: Callable[[LoadedModel, Executor], None]) -> None:
        """Run ``work``; if it raises, fail the batch's requests and start a new batch."""
        model, executor = self._model, self._executor
        if not (model and executor):
            return
        try:
            work(model, executor)
        except BackendLost:
            raise
        except Exception as error:  # noqa: BLE001 - after any exception the rows are lost
            self._recover(error)
            executor.close()
            self._start_batch(model)

    def _start_batch(self, model: LoadedModel) -> None:
        self._executor = model.new_executor()
        self._scheduler.start_batch(model, self._executor)

    def _admit_and_run(self, model: LoadedModel, executor: Executor) -> None:
        for request in self._scheduler.admit(model):
            self._registry.note_admission()
            _add(request, executor)
        if item := self._scheduler.next_item():
            self._run(item, executor)
            model.save_prefixes(is_idle=False)
            if isinstance(item, DecodeItem):
                self._preempt_slow_readers(executor)
            # Not after prefill, which may succeed each time before a decode step that fails.
            if isinstance(item, DecodeItem) or not self._scheduler.admitted:
                self._failed_steps = 0

    def _run(self, item: WorkItem, executor: Executor) -> None:
        self._has_stepped = True
        report = executor.run(item)
        if report.drafted:
            self._scheduler.admitted[report.events[0].row].on_draft(report.drafted)
        dtype = self._model.info.dtype if self._model else ""
        ended = self._dispatcher.dispatch(self._scheduler.record(item, report), dtype)
        if ended:
            # Before `remove`, which takes time to copy KV caches into the prefix cache.
            self._dispatcher.publish()
            executor.remove(ended)

    def _preempt_slow_readers(self, executor: Executor) -> None:
        for request in self._scheduler.slow_readers():
            executor.preempt(request.id)
            self._scheduler.preempt(request)
            request.stream.on_drained(partial(self._commands.put, Resume(request.id)))

    def _recover(self, error: Exception) -> None:
        """Fail the requests of the batch; raise after too many consecutive failed steps."""
        self._failed_steps += 1
        self._registry.note_error(f"a step failed: {type(error).__name__}")
        logger.error("step failed with %d rows", len(self._scheduler.all_admitted), exc_info=error)
        self._dispatcher.fail(self._scheduler.all_admitted, step_fault(error))
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise RuntimeError(f"{self._failed_steps} steps in a row failed") from error

    # -- loads and unloads -------------------------------------------------------

    def _change_model(self, command: ModelCommand[_T], work: Callable[[], _T]) -> None:
        """Run a load or an unload and set its outcome. No-op if the future was cancelled."""
        if not command.future.set_running_or_notify_cancel():
            self._registry.end_command()
            return
        try:
            result = work()
        except RunnerFault as fault:
            self._registry.end_command()
            # Engine.lose may have set an exception already.
            with suppress(InvalidStateError):
                command.future.set_exception(fault)
        else:
            self._registry.end_command()
            with suppress(InvalidStateError):
                command.future.set_result(result)

    def _load(self, command: Load) -> ModelInfo:
        spec = command.spec
        self._check(command)
        self._end_all(ShuttingDown("the model is being replaced; load or use another runner"))
        self._free_model(for_next=True)

        def report(progress: int) -> None:
            self._registry.note_progress(progress)
            self._refuse_when_cancelled(command)

        try:
            report(0)
            self._model = self._backend.load(spec, report)
            self._prefix_cache_bytes = self._model.info.prefix_cache_bytes
            self._start_batch(self._model)
            report(100)
        except BackendLost:
            raise
        except Exception as error:  # noqa: BLE001 - a model that fails must not end the process
            fault = self._load_failed(spec, error)
            self._free_model()
            raise fault from None
        self._registry.offer_model(ModelHandle.of(self._model, spec.model))
        return self._model.info

    def _check(self, command: Load) -> None:
        """Refuse what cannot be found or read, or is cancelled, before freeing the loaded model."""
        try:
            self._require_drafts(command.spec)
            self._backend.check(command.spec)
            self._refuse_when_cancelled(command)
        except Exception as error:  # noqa: BLE001 - as for a load
            raise self._load_failed(command.spec, error) from None

    def _require_drafts(self, spec: LoadSpec) -> None:
        """Refuse a draft model where drafts are off."""
        if spec.draft_model and not self._max_draft:
            text = "this server checks no drafts: it was started with --draft-tokens 0"
            raise InvalidField([("draft_model", text)])

    def _refuse_when_cancelled(self, load: Load) -> None:
        if load.cancelled.is_set() or self._registry.is_stopping:
            raise ShuttingDown("the load was cancelled")

    def _load_failed(self, spec: LoadSpec, error: Exception) -> RunnerFault:
        """Note why a load failed, and return the fault for its caller."""
        fault = load_fault(spec, error)
        self._registry.note_failed_load(spec, fault)
        return fault

    def _unload(self) -> int:
        before = self._backend.memory().held_bytes
        self._end_all(ShuttingDown("the model was unloaded; load or use another runner"))
        self._free_model()
        return max(0, before - self._backend.memory().held_bytes)

    def _end_all(self, fault: RunnerFault) -> None:
        self._dispatcher.fail(self._registry.withdraw_model(), fault)
        self._dispatcher.publish()

    def _free_model(self, *, for_next: bool = False) -> None:
        if self._executor:
            self._executor.close()
        if self._model:
            self._model.close()
        self._scheduler.clear()
        self._executor = self._model = None
        self._backend.release(for_next=for_next)

    # -- the end -----------------------------------------------------------------

    def _close(self) -> None:
        fault = stopping_fault()
        self._end_all(fault)
        self._registry.fail_commands(fault)
        self._free_model()
        self._backend.close()

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine is dead; the process exits", exc_info=error)
        text, fault, refusal = death_faults(error)
        self._dispatcher.fail(self._registry.die(text), fault)
        self._dispatcher.publish()
        self._registry.fail_commands(refusal)
        call_on_loop(self._loop, self._on_death)
        self._scheduler.clear()
        self._executor = self._model = None
        try:
            self._backend.close()
        except Exception:
            logger.exception("the model library could not be closed")


def _add(request: AnyRequest, executor: Executor) -> None:
    """Add an admitted request to the executor."""
    if isinstance(request, EmbeddingRequest):
        executor.add_texts(request.id, request.spec.texts)
        return
    spec = request.spec
    executor.add(
        request.id,
        spec.prompt_ids,
        spec.sampling,
        spec.cache_policy,
        request.matcher,
        spec.adapter,
    )
