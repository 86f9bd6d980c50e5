"""The event loop's side of the engine.

No method waits. :class:`~runner_server.engine.thread.EngineThread` does the work on its own
thread, and :class:`~runner_server.engine.request_registry.RequestRegistry` is the state that the
event loop and that thread share.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from runner_server.engine.backend import Backend, ModelHandle
from runner_server.engine.commands import (
    Cancel,
    CommandQueue,
    LimitPrefixCache,
    Load,
    Stop,
    Trim,
    Unload,
)
from runner_server.engine.generation_request import GenerationRequest, RequestStatus
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.thread import EngineThread
from runner_server.engine.types import (
    CompletionSpec,
    EngineState,
    LoadSpec,
    MemoryCounters,
)
from runner_server.errors import ShuttingDown

_ModelCommandT = TypeVar("_ModelCommandT", Load, Unload)


class Engine:
    """Runs one model on a thread of its own.

    Args:
        backend: The model library.
        max_queued: How many completions may wait for a place.
        on_death: Called on the loop, once, if the engine cannot go on.

    Must be created on the running event loop, and called there.
    """

    def __init__(self, backend: Backend, *, max_queued: int, on_death: Callable[[], None]) -> None:
        self._backend = backend
        self._on_death = on_death
        self._commands = CommandQueue()
        self._registry = RequestRegistry(max_queued)
        self._loop = asyncio.get_running_loop()
        self._engine_thread = EngineThread(
            backend, self._registry, self._commands, self._loop, on_death
        )
        self._is_lost = False
        # Not a wait in a worker thread: those may all be busy with tokenizing.
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        self._engine_thread.run()
        self._loop.call_soon_threadsafe(self._ended.set)

    @property
    def device(self) -> str:
        """The device that computes; empty until the model library is imported."""
        return self._engine_thread.device

    def start(self) -> None:
        """Starts the thread, which imports the model library first."""
        self._thread.start()

    def load(self, spec: LoadSpec) -> Load:
        """Begin a load; its ``future`` has the outcome, setting its ``cancelled`` stops it.

        Raises:
            Busy: Another load or unload is under way.
            ShuttingDown: The engine is stopping or dead.
        """
        return self._begin(Load(spec))

    def unload(self) -> Unload:
        """Begin an unload, which ends with the number of bytes freed; raise like :meth:`load`."""
        return self._begin(Unload())

    def _begin(self, command: _ModelCommandT) -> _ModelCommandT:
        self._registry.begin_command(command)
        self._commands.put(command)
        return command

    def trim(self, prefix_cache_bytes: int) -> Future[None]:
        """Begins to give freed memory back; the result ends when it is back.

        Args:
            prefix_cache_bytes: What evaluated prompts are reduced to first.

        Raises:
            Busy: A load or unload runs.
            ShuttingDown: The engine stops, or is dead.
        """
        future: Future[None] = Future()
        self._registry.begin_trim(future)
        self._commands.put(Trim(prefix_cache_bytes, future))
        return future

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Changes how much evaluated prompts may take from now on."""
        self._commands.put(LimitPrefixCache(limit_bytes))

    def refuse_when_ending(self) -> None:
        """Raises :class:`ShuttingDown` if the engine stops, or is dead."""
        self._registry.refuse_when_ending()

    def model(self) -> ModelHandle:
        """The loaded model's description and tokenizer.

        Raises:
            ModelNotLoaded: There is none.
            ShuttingDown: The engine stops, or is dead.
        """
        return self._registry.model()

    def submit(self, model: ModelHandle, spec: CompletionSpec) -> GenerationRequest:
        """Queues a completion.

        Args:
            model: The model that ``spec`` was validated for.
            spec: What to complete.

        Raises:
            ModelNotLoaded: That model is gone.
            InsufficientMemory: It could never have a place.
            QueueFull: Too many completions wait.
            ShuttingDown: The engine stops, or is dead.
        """
        request = GenerationRequest(spec, model.codec, model.info.eos_token_ids)
        self._registry.accept(model, request)
        self._commands.put(request)
        return request

    def cancel(self, request: GenerationRequest) -> None:
        """Cancel a request whose reader is gone. No-op once it has finished."""
        if request.status is not RequestStatus.FINISHED:
            self._commands.put(Cancel(request))

    def state(self) -> EngineState:
        """What the engine does, without waiting for it."""
        return self._registry.state()

    def memory(self) -> MemoryCounters:
        """What the model library holds."""
        return self._backend.memory()

    def stop(self) -> None:
        """Ends all completions, frees the model and ends the thread; does not wait."""
        self._registry.stop()
        self._commands.put(Stop())

    def lose(self, text: str) -> None:
        """End all calls although the engine's thread may hang inside MLX.

        Only the readers are released here: the engine's thread owns the requests, and fails
        them if it ever runs again.

        Args:
            text: The reason, for callers.
        """
        self._is_lost = True
        fault = ShuttingDown(text)
        for request in self._registry.die(text):
            request.stream.fail(fault)
            request.stream.wake()
        self._registry.fail_commands(fault)
        # The thread ends unless it hangs.
        self._commands.put(Stop())
        self._on_death()

    async def wait_ended(self, timeout_seconds: float) -> bool:
        """Waits until the thread has ended; returns whether it has."""
        if self._thread.ident is None or self._is_lost:
            # It was never started, or it may hang inside MLX and is of no use.
            return True
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_seconds)
        except TimeoutError:
            return False
        # It has nothing left to do.
        self._thread.join()
        return True
