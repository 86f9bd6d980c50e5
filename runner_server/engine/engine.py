"""The engine as seen from the event loop.

No method blocks. :class:`~runner_server.engine.thread.EngineThread` does the work on a dedicated
thread, and :class:`~runner_server.engine.request_registry.RequestRegistry` holds the state that
the event loop and that thread share.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TypeVar

from runner_server.engine.backend import Backend, Matcher, ModelHandle
from runner_server.engine.change_signal import ChangeSignal
from runner_server.engine.commands import (
    Cancel,
    CommandQueue,
    LimitPrefixCache,
    Load,
    Stop,
    Trim,
    Unload,
)
from runner_server.engine.drain import Drain
from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.embedding.types import EmbedSpec
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.output.wakeups import call_on_loop
from runner_server.engine.request import RequestStatus
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.thread import EngineThread
from runner_server.engine.types import (
    CompletionSpec,
    EngineState,
    LoadSpec,
    MemoryCounters,
)
from runner_server.errors import Aborted, RunnerFault, ShuttingDown

_ModelCommandT = TypeVar("_ModelCommandT", Load, Unload)


class Engine:
    """One model on a dedicated thread.

    Args:
        backend: The model library.
        max_queued: Most requests that may wait for a slot.
        max_draft: Most tokens to draft for a request that is alone in the batch; 0 drafts none.
        on_death: Called once on the event loop if the engine cannot continue.

    Create and call the engine on the running event loop.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_queued: int,
        on_death: Callable[[], None],
        max_draft: int = 0,
    ) -> None:
        self._backend = backend
        self._on_death = on_death
        self._commands = CommandQueue()
        self._loop = asyncio.get_running_loop()
        self._changes = ChangeSignal(self._loop)
        self._registry = RequestRegistry(max_queued, self._changes.notify)
        self._engine_thread = EngineThread(
            backend, self._registry, self._commands, self._loop, on_death, max_draft
        )
        self._is_lost = False
        # Not Thread.join in a worker thread: all worker threads may be busy tokenizing.
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        self._engine_thread.run()
        call_on_loop(self._loop, self._ended.set)

    @property
    def device(self) -> str:
        """Name of the device; empty until the model library is imported."""
        return self._engine_thread.device

    def start(self) -> None:
        """Start the thread, which first imports the model library."""
        self._thread.start()

    def load(self, spec: LoadSpec) -> Load:
        """Begin a load. ``future`` resolves to the outcome; set ``cancelled`` to stop the load.

        Raises:
            Busy: Another load or unload is under way.
            ShuttingDown: The engine is stopping or dead.
        """
        return self._begin(Load(spec))

    def unload(self, name: str = "") -> Unload:
        """Begin an unload. ``future`` resolves to the bytes freed.

        Args:
            name: The name in the call; empty for any model, or none.

        Raises:
            Busy: A load or another unload is under way.
            ModelNotLoaded: The name is that of another model.
            ShuttingDown: The engine is stopping or dead.
        """
        return self._begin(Unload(), name)

    def _begin(self, command: _ModelCommandT, name: str = "") -> _ModelCommandT:
        self._registry.begin_command(command, name)
        self._commands.put(command)
        return command

    def trim(self, prefix_cache_bytes: int, name: str = "") -> Future[None]:
        """Begin to return freed memory to the system; the future resolves when done.

        Args:
            prefix_cache_bytes: Size to which the prefix cache is evicted first.
            name: The name in the call; empty for any model, or none.

        Raises:
            Busy: A load or unload is under way.
            ModelNotLoaded: The name is that of another model.
            ShuttingDown: The engine is stopping or dead.
        """
        future: Future[None] = Future()
        self._registry.begin_trim(future, name)
        self._commands.put(Trim(prefix_cache_bytes, future))
        return future

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Change the byte budget of the prefix cache."""
        self._commands.put(LimitPrefixCache(limit_bytes))

    def refuse_when_ending(self) -> None:
        """Raise :class:`ShuttingDown` if the engine is stopping or dead."""
        self._registry.refuse_when_ending()

    def refuse_when_busy(self) -> None:
        """Raise what :meth:`load` would raise at this moment."""
        self._registry.refuse_when_busy()

    def note_refused_load(self, spec: LoadSpec, fault: RunnerFault) -> None:
        """Record a load that was refused before it began."""
        self._registry.note_failed_load(spec, fault)

    def model(self, name: str = "") -> ModelHandle:
        """Return the handle of the loaded model.

        Args:
            name: The name in the call: that of the load, or the model's path; empty for any.

        Raises:
            ModelNotLoaded: No model is loaded, or another one.
            ShuttingDown: The engine is stopping or dead.
        """
        return self._registry.model(name)

    def require_named(self, name: str) -> None:
        """Raise :class:`ModelNotLoaded` unless a name is empty or means the loaded model."""
        self._registry.require_named(name)

    def submit(
        self, model: ModelHandle, spec: CompletionSpec, matcher: Matcher | None = None
    ) -> GenerationRequest:
        """Queue a request.

        Args:
            model: The model that ``spec`` was validated for.
            spec: The validated request.
            matcher: Constrains the text; made by the model's grammars.

        Raises:
            ModelNotLoaded: That model is gone.
            InsufficientMemory: The request could never be admitted.
            QueueFull: Too many requests wait.
            ShuttingDown: The engine is stopping, dead or draining.
        """
        request = GenerationRequest(spec, model.codec, model.info.eos_token_ids, matcher)
        self._registry.accept(model, request)
        self._commands.put(request)
        return request

    def embed(self, model: ModelHandle, spec: EmbedSpec) -> EmbeddingRequest:
        """Queue a request to embed texts; see :meth:`submit`."""
        request = EmbeddingRequest(spec)
        self._registry.accept(model, request)
        self._commands.put(request)
        return request

    def cancel(self, request: AnyRequest) -> None:
        """Cancel a request whose reader is gone or whose stream has ended. No-op once finished."""
        if request.status is not RequestStatus.FINISHED:
            self._commands.put(Cancel(request))

    def abort(self, request_ids: Collection[str]) -> int:
        """End requests by the names that their callers gave them; return how many ended.

        The streams end at once, and the rows before the next step.

        Raises:
            ShuttingDown: The engine is stopping or dead.
        """
        found = self._registry.named(request_ids)
        return sum(self._end(request, Aborted("an Abort")) for request in found)

    def drain(self) -> Drain:
        """Refuse new requests; ``future`` resolves once the present ones have ended.

        Call :meth:`end_drain` then, or to give up.

        Raises:
            ShuttingDown: The engine is stopping or dead.
        """
        return self._registry.begin_drain()

    def abort_drained(self, drain: Drain) -> None:
        """End the requests that a drain waits for."""
        for request in drain.requests:
            self._end(request, Aborted("a Drain whose timeout passed"))

    def end_drain(self, drain: Drain, *, is_drained: bool) -> None:
        """Record the end of a drain; see :meth:`RequestRegistry.end_drain`."""
        self._registry.end_drain(drain, is_drained=is_drained)

    def refuse_when_draining(self) -> None:
        """Raise :class:`ShuttingDown` if new requests are refused because of a drain."""
        self._registry.refuse_when_draining()

    def _end(self, request: AnyRequest, fault: RunnerFault) -> bool:
        """End a request with a fault; return False if it had already ended."""
        if not request.stream.fail(fault):
            return False
        request.stream.wake()
        # Not left to the service, whose stream may be blocked by a reader that does not read.
        self.cancel(request)
        return True

    def state(self) -> EngineState:
        """Return a snapshot of the engine's state."""
        return self._registry.state()

    def watch(self) -> AbstractContextManager[asyncio.Event]:
        """Return a context with an event that is set after each change of the state but steps."""
        return self._changes.watch()

    def memory(self) -> MemoryCounters:
        """Return the memory of the model library."""
        return self._backend.memory()

    def stop(self) -> None:
        """Begin a shutdown: fail the requests, free the model and end the thread."""
        self._registry.stop()
        self._commands.put(Stop())

    def lose(self, text: str) -> None:
        """Declare the engine dead and fail every call, even if the thread hangs inside MLX.

        The output channels get the fault here. The requests themselves belong to the engine's
        thread, which fails them if it ever returns from MLX.

        Args:
            text: The reason, for callers.
        """
        self._is_lost = True
        fault = ShuttingDown(text)
        for request in self._registry.die(text):
            request.stream.fail(fault)
            request.stream.wake()
        self._registry.fail_commands(fault)
        # Wakes the thread so that it ends, unless it hangs.
        self._commands.put(Stop())
        self._on_death()

    async def wait_ended(self, timeout_seconds: float) -> bool:
        """Wait for the thread to end; return False on a timeout."""
        if self._thread.ident is None or self._is_lost:
            # Never started, or abandoned because it may hang inside MLX.
            return True
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_seconds)
        except TimeoutError:
            return False
        # The thread has nothing left to do.
        self._thread.join()
        return True
