"""Sync pool of runners."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from runner_client.errors import RunnerUnavailableError
from runner_client.pool.aio_pool import AsyncRunnerPool
from runner_client.rpc.client import RunnerClient

if TYPE_CHECKING:
    import logging
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
    from types import TracebackType

    from runner_client.memory.gate import MemoryGate
    from runner_client.pool.aio_member import Member
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.types import MemoryReturn, PoolModel, PoolStatus
    from runner_client.types import RestartPolicy, Timeouts

T = TypeVar("T")


class RunnerPool:
    """Many models on one machine within one budget of bytes; ``AsyncRunnerPool`` for threads.

    ::

        with RunnerPool(PoolSettings(budget_bytes=24 * 2**30)) as pool:
            with pool.runner("org/model") as runner:
                print(runner.complete("Once upon a time").content)

    Thread-safe. An ``AsyncRunnerPool`` runs on an event loop in a thread of its own; the clients
    that this pool hands out are sync ones. ``on_progress`` callbacks run in that thread, and must
    neither block nor call the pool.

    The arguments are those of ``AsyncRunnerPool``.

    Raises:
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        settings: PoolSettings | None = None,
        *,
        gate: MemoryGate | None = None,
        timeouts: Timeouts | None = None,
        restart_policy: RestartPolicy | None = None,
        blas: str = "auto",
        env: Mapping[str, str] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self._pool = AsyncRunnerPool(
            settings,
            gate=gate,
            timeouts=timeouts,
            restart_policy=restart_policy,
            blas=blas,
            env=env,
            log=log,
        )
        self._timeouts = timeouts
        self._service: concurrent.futures.Future[_Service] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._serve, name="runner-pool", daemon=True)
        self._lock = threading.Lock()
        self._is_over = False
        self._ended = threading.Event()
        self._clients: weakref.WeakKeyDictionary[Member, RunnerClient] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def runner(
        self,
        model: str,
        *,
        evict: bool = True,
        timeout_seconds: float | None = None,
        on_progress: Callable[[PoolModel], None] | None = None,
    ) -> Iterator[RunnerClient]:
        """Lease a model's runner; see ``AsyncRunnerPool.runner``.

        Raises:
            RunnerError: The model does not fit, or its load failed.
        """
        granted: concurrent.futures.Future[Member] = concurrent.futures.Future()

        async def hold() -> None:
            lease = self._pool.lease(
                model, evict=evict, timeout_seconds=timeout_seconds, on_progress=on_progress
            )
            try:
                async with lease as member:
                    # Otherwise the caller is gone.
                    if granted.set_running_or_notify_cancel():
                        granted.set_result(member)
                        await asyncio.Event().wait()
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    granted.set_exception(error)

        # The lease lasts as long as this task.
        holding = self._submit(hold())
        holding.add_done_callback(lambda _: granted.cancel())
        try:
            yield self._client(_member(granted))
        finally:
            holding.cancel()

    def load(
        self,
        model: str,
        *,
        evict: bool = True,
        timeout_seconds: float | None = None,
        on_progress: Callable[[PoolModel], None] | None = None,
    ) -> PoolModel:
        """Load a model without leasing it; see ``AsyncRunnerPool.load``.

        Raises:
            RunnerError: The model does not fit, or its load failed.
        """
        return self._call(
            self._pool.load(
                model, evict=evict, timeout_seconds=timeout_seconds, on_progress=on_progress
            )
        )

    def evict(self, model: str) -> MemoryReturn:
        """Stop the runner of a model that is not in use; see ``AsyncRunnerPool.evict``.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
            BusyError: The model is in use or being loaded.
        """
        return self._call(self._pool.evict(model))

    def pin(self, model: str) -> None:
        """Keep a model from being evicted to make room. Does not load it.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        self._call(self._pin(model, is_pinned=True))

    def unpin(self, model: str) -> None:
        """Let a model be evicted to make room.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        self._call(self._pin(model, is_pinned=False))

    async def _pin(self, model: str, *, is_pinned: bool) -> None:
        (self._pool.pin if is_pinned else self._pool.unpin)(model)

    def status(self) -> PoolStatus:
        """Return the present state of the pool and its models."""
        return self._call(self._status())

    async def _status(self) -> PoolStatus:
        return self._pool.status()

    def models(self) -> tuple[PoolModel, ...]:
        """Return every model that was requested from this pool, loaded or not."""
        return self.status().models

    def watch(self) -> Iterator[PoolStatus]:
        """Yield the state of the pool now and after each change, until the pool is closed."""
        states = self._pool.watch()
        try:
            while True:
                try:
                    state = self._call(_next(states))
                except StopAsyncIteration:
                    return
                except RunnerUnavailableError:
                    if self._is_over:
                        return
                    raise
                yield state
        finally:
            # A closed pool has ended it.
            with contextlib.suppress(RunnerUnavailableError):
                self._call(states.aclose())

    def close(self) -> None:
        """Stop every runner and wait until they are reaped. An interrupt kills them.

        May be called from any thread and repeatedly.
        """
        if self._thread.ident is None:
            return
        service = self._service.result()
        try:
            _tell(service, service.stop.set)
            # Python 3.11 takes a thread whose join was interrupted for dead.
            self._ended.wait()
        except BaseException:
            _tell(service, service.task.cancel)
            self._ended.wait()
            raise
        finally:
            self._thread.join()

    def __enter__(self) -> Self:
        with self._lock:
            if self._thread.ident is not None or self._is_over:
                raise RunnerUnavailableError("a pool is entered once; create another")
            self._thread.start()
        try:
            self._service.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        work = self._keep_open()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(work)
        except BaseException as error:
            if self._service.done():
                raise
            self._is_over = True
            self._service.set_exception(error)
        finally:
            work.close()
            self._ended.set()

    async def _keep_open(self) -> None:
        async with self._pool:
            task = cast("asyncio.Task[None]", asyncio.current_task())
            service = _Service(asyncio.get_running_loop(), asyncio.Event(), task)
            self._service.set_result(service)
            try:
                await service.stop.wait()
            finally:
                # What was submitted by now ends with the pool; later work would never run.
                with self._lock:
                    self._is_over = True

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._service.done() and not self._is_over:
                return asyncio.run_coroutine_threadsafe(work, self._service.result().loop)
        work.close()
        raise RunnerUnavailableError("the pool is not open: use it in a `with` block")

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's thread; an interrupt cancels it."""
        running = self._submit(work)
        try:
            return running.result()
        except concurrent.futures.CancelledError:
            raise RunnerUnavailableError("the pool was closed") from None
        except BaseException:
            running.cancel()
            raise

    def _client(self, member: Member) -> RunnerClient:
        """Return the client that all leases of a runner share; it is closed with the runner."""
        with self._lock:
            client = self._clients.get(member)
            if client is None:
                process = member.process
                client = self._clients[member] = RunnerClient(
                    process.address or "",
                    token=process.token,
                    timeouts=self._timeouts,
                    peer=process.peer,
                )
                process.on_exit(client.close)
            return client


@dataclass(frozen=True, slots=True)
class _Service:
    """The event loop of an open pool, the event that ends it, and the task that runs it."""

    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    task: asyncio.Task[None]


def _tell(service: _Service, what: Callable[[], object]) -> None:
    # A closed loop has nothing to do.
    with contextlib.suppress(RuntimeError):
        service.loop.call_soon_threadsafe(what)


def _member(granted: concurrent.futures.Future[Member]) -> Member:
    try:
        return granted.result()
    except concurrent.futures.CancelledError:
        raise RunnerUnavailableError("the pool was closed") from None


async def _next(states: AsyncIterator[PoolStatus]) -> PoolStatus:
    return await anext(states)
