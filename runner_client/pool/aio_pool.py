"""Asyncio pool of runners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Self

from runner_client.checks import (
    check_callable,
    check_environment,
    check_flag,
    check_kind,
    check_model,
    check_number,
)
from runner_client.errors import (
    BusyError,
    ModelNotLoadedError,
    RunnerTimeoutError,
    RunnerUnavailableError,
)
from runner_client.memory.gate import MemoryGate
from runner_client.pool.aio_manager import PoolManager
from runner_client.pool.aio_pressure import PressureRelief
from runner_client.pool.aio_report import ProgressReport, describe, describe_pool
from runner_client.pool.appraisal import Appraisal, appraise
from runner_client.pool.scheduling.settings import PoolSettings
from runner_client.pool.scheduling.states import ModelState
from runner_client.pool.types import NOTHING, PoolStatus
from runner_client.process.aio_process import AsyncRunnerProcess
from runner_client.process.aio_spare import SpareProcess
from runner_client.types import RestartPolicy, Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
    from types import TracebackType

    from runner_client.pool.aio_entry import Entry
    from runner_client.pool.aio_member import Member
    from runner_client.pool.scheduling.states import Lease
    from runner_client.pool.types import MemoryReturn, PoolModel
    from runner_client.rpc.aio_client import AsyncRunnerClient

logger = logging.getLogger(__name__)

_NOT_OPEN = "the pool is not open: use it in an `async with` block"


class AsyncRunnerPool:
    """Many models on one machine, each in a runner of its own, within one budget of bytes.

    ::

        async with AsyncRunnerPool(PoolSettings(budget_bytes=24 * 2**30)) as pool:
            async with pool.runner("org/model") as runner:
                print((await runner.complete("Once upon a time")).content)

    A lease loads the model if it is absent. Leases of one model share its runner and its batch. If
    memory is short, idle models are evicted, and the next model is loaded once their memory is
    back. docs/pool.md has the rules.

    A pool belongs to the event loop on which it is entered. On exit it stops every runner.

    Args:
        settings: The budget and the settings of models.
        gate: Measures and reserves the machine's memory. Default: a ``MemoryGate`` for the
            runners' environment.
        timeouts: How long to wait for runners and calls.
        restart_policy: How often the runner of a model may die and be replaced for the next
            lease. Beyond that, leases of the model are refused until the window has passed.
        blas: As for ``AsyncRunnerProcess``.
        env: Environment variables for the runners, in addition to those of this process.
        log: Logger for the output of the runners. Default: ``runner_client.child``.

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
        check_kind("settings", settings, PoolSettings)
        check_kind("gate", gate, MemoryGate)
        check_kind("timeouts", timeouts, Timeouts)
        check_kind("restart_policy", restart_policy, RestartPolicy)
        check_environment("env", env)
        self._settings = settings or PoolSettings()
        self._environ = {**os.environ, **(env or {})}
        self._gate = gate or MemoryGate(environ=self._environ)
        self._timeouts = timeouts
        self._blas, self._env, self._log = blas, env, log
        self._manager = PoolManager(
            self._settings,
            self._gate,
            restart_policy or RestartPolicy(),
            self._new_process,
            partial(SpareProcess, gate=self._gate, timeouts=timeouts, blas=blas, env=env, log=log),
        )
        self._pressure = PressureRelief(self._manager, self._gate, self._settings.reserve_bytes)
        self._names: dict[str, str] = {}
        self._service: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def runner(
        self,
        model: str,
        *,
        evict: bool = True,
        timeout_seconds: float | None = None,
        on_progress: Callable[[PoolModel], None] | None = None,
    ) -> AsyncIterator[AsyncRunnerClient]:
        """Lease a model's runner, and load the model first if necessary.

        The model stays loaded during the block, unless its runner dies. The leases of a model share
        the client: do not close it.

        Args:
            model: A directory, or a hub id in the local Hugging Face cache.
            evict: Whether other models may be evicted. Otherwise the lease is refused at once if
                the model is absent and does not fit.
            timeout_seconds: How long to wait for the lease. Default: no limit.
            on_progress: Called when the load's progress, the position in the queue or the reason of
                the wait changes.

        Raises:
            InsufficientMemoryError: The model does not fit, even if every model that may go went;
                or ``evict`` is False, and others would have to go.
            ModelNotFoundError: The model does not exist.
            ModelUnsupportedError: The model cannot be loaded.
            RunnerTimeoutError: The lease did not come in time (phase ``"load"``).
            RunnerExitedError: The runner died while it loaded the model.
            RunnerUnavailableError: The pool is closed, or the model's runners keep dying.
            RunnerError: The load failed for another reason.
        """
        lease = self.lease(
            model, evict=evict, timeout_seconds=timeout_seconds, on_progress=on_progress
        )
        async with lease as member:
            yield member.client

    @contextlib.asynccontextmanager
    async def lease(
        self,
        model: str,
        *,
        evict: bool = True,
        timeout_seconds: float | None = None,
        on_progress: Callable[[PoolModel], None] | None = None,
    ) -> AsyncIterator[Member]:
        """Lease as ``runner`` does, with access to the process; for front ends of the pool."""
        entry, lease = await self._acquire(model, evict, timeout_seconds, on_progress)
        while (member := entry.member) is None or member.process.exit_error:
            # It died before the grant or just now.
            self._manager.release(lease)
            self._manager.note_exit(entry)
            entry, lease = await self._acquire(model, evict, timeout_seconds, on_progress)
        try:
            yield member
        finally:
            self._manager.release(lease)

    async def load(
        self,
        model: str,
        *,
        evict: bool = True,
        timeout_seconds: float | None = None,
        on_progress: Callable[[PoolModel], None] | None = None,
    ) -> PoolModel:
        """Load a model without leasing it. Arguments and errors are those of ``runner``."""
        entry, _ = await self._acquire(model, evict, timeout_seconds, on_progress, is_lease=False)
        return self._describe(entry)

    async def know(self, model: str) -> PoolModel:
        """Estimate a model without loading it; it may be pinned then.

        Raises:
            RunnerError: As for ``estimate``.
        """
        check_model(model)
        return self._describe(await self._known(model))

    def member(self, model: str) -> Member:
        """Return the runner of a loaded model without a lease; for front ends of the pool.

        Raises:
            ModelNotLoadedError: The model is not loaded.
        """
        name = self._names.get(model)
        entry = None if name is None else self._manager.entries[name]
        if entry is None or entry.member is None or entry.model.state is not ModelState.READY:
            raise ModelNotLoadedError(f"{model} is not loaded", model=model)
        return entry.member

    async def evict(self, model: str) -> MemoryReturn:
        """Stop the runner of a model that is not in use, pinned or not, and wait for its memory.

        A load that waits begins before, as soon as enough memory is free for it.

        Returns:
            The memory that the runner held and that came back; zero if the model was not loaded.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
            BusyError: The model is in use or being loaded.
        """
        entry = self._entry(model)
        pooled = entry.model
        if pooled.state is ModelState.LOADING or pooled.leases:
            use = f"is used by {pooled.leases}" if pooled.leases else "is being loaded"
            raise BusyError(f"{pooled.name} {use}; wait, or cancel the requests for it")
        if pooled.state is ModelState.ABSENT:
            return NOTHING
        if pooled.state is ModelState.READY:
            self._manager.begin_eviction(entry, "as requested")
        if entry.task is not None:
            await asyncio.shield(entry.task)
        return entry.last_return

    def pin(self, model: str) -> None:
        """Keep a model from being evicted to make room. Does not load it.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        self._entry(model).model.is_pinned = True
        self._manager.notify()

    def unpin(self, model: str) -> None:
        """Let a model be evicted to make room.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        pooled = self._entry(model).model
        pooled.is_pinned = False
        if pooled.chosen_seconds == math.inf:
            pooled.chosen_seconds = None
        self._manager.notify()

    def keep(self, model: str, seconds: float) -> None:
        """Choose the keep-alive of a model until the next eviction.

        For front ends of the pool. Takes the place of an earlier choice and of the settings, but
        does not end a pin of the settings or by :meth:`pin`.

        Args:
            model: The model. No-op if it is not in memory.
            seconds: The time; ``inf`` pins the model.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        pooled = self._entry(model).model
        if pooled.is_held:
            pooled.chosen_seconds = seconds
            self._manager.notify()

    def kept_seconds(self, model: str) -> float:
        """Return the time for which an unused model stays; ``inf`` without a limit.

        Raises:
            ModelNotLoadedError: The model was never requested from this pool.
        """
        pooled = self._entry(model).model
        if pooled.stays:
            return math.inf
        idle_seconds = time.monotonic() - pooled.idle_since if pooled.is_idle else 0.0
        return max(0.0, pooled.keep_alive_seconds - idle_seconds)

    def status(self) -> PoolStatus:
        """Return the present state of the pool and its models."""
        return describe_pool(self._settings, self._manager.scheduler, self.models())

    def models(self) -> tuple[PoolModel, ...]:
        """Return every model that was requested from this pool, loaded or not."""
        return tuple(map(self._describe, self._manager.entries.values()))

    async def watch(self) -> AsyncGenerator[PoolStatus]:
        """Yield the state of the pool now and after each change, until the pool is closed.

        A slow reader misses states in between, never the last one.

        Raises:
            RunnerUnavailableError: The pool was not entered.
        """
        if self._service is None and not self._manager.is_closed:
            raise RunnerUnavailableError(_NOT_OPEN)
        async with contextlib.aclosing(self._manager.watch()) as changes:
            async for _ in changes:
                yield self.status()

    async def close(self) -> None:
        """Stop every runner and wait until they are reaped. Cancelling the task kills them."""
        service, self._service = self._service, None
        if service is not None:
            service.cancel()
        try:
            await self._manager.close()
        finally:
            if service is not None:
                await asyncio.gather(service, return_exceptions=True)

    async def __aenter__(self) -> Self:
        if self._service is not None or self._manager.is_closed:
            raise RunnerUnavailableError("a pool is entered once; create another")
        self._service = asyncio.create_task(self._serve())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._manager.run())
                group.create_task(self._pressure.run())
        except Exception:
            # A defect. Requests must not wait for decisions that never come.
            logger.exception("the pool has failed, and refuses all requests")
            self._manager.refuse_all("the pool has failed; its log has the details")
            raise

    async def _acquire(
        self,
        model: str,
        evict: bool,
        timeout_seconds: float | None,
        on_progress: Callable[[PoolModel], None] | None,
        *,
        is_lease: bool = True,
    ) -> tuple[Entry, Lease | None]:
        check_model(model)
        check_flag("evict", evict)
        check_number("timeout_seconds", timeout_seconds)
        check_callable("on_progress", on_progress)
        if self._service is None:
            raise RunnerUnavailableError(_NOT_OPEN)
        try:
            async with asyncio.timeout(timeout_seconds) as limit:
                entry = await self._known(model)
                described = partial(self._describe, entry)
                report = ProgressReport(described, on_progress) if on_progress else None
                return entry, await self._manager.request(
                    entry, may_evict=evict, is_lease=is_lease, on_change=report
                )
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self._late(model, timeout_seconds or 0) from error

    def _late(self, model: str, timeout_seconds: float) -> RunnerTimeoutError:
        reason = ""
        if (name := self._names.get(model)) is not None:
            entry = self._manager.entries[name]
            described = self._describe(entry)
            reason = entry.last_reason
            reason = reason or f"it is {described.state}, {described.progress} % loaded"
        return RunnerTimeoutError(
            f"{model} was not loaded within {timeout_seconds:g} s"
            + (f": {reason}" if reason else ""),
            phase="load",
            timeout_seconds=timeout_seconds,
        )

    async def _known(self, model: str) -> Entry:
        """Return the entry of a model, appraised unless it is loaded or being loaded."""
        name = self._names.get(model)
        if name is not None:
            entry = self._manager.entries[name]
            if entry.model.is_held:
                return entry
        scheduler, budget_bytes = self._manager.scheduler, self._settings.budget_bytes
        kept_bytes = scheduler.kept_bytes
        going_bytes = scheduler.held_bytes - kept_bytes
        appraisal = await asyncio.to_thread(
            appraise,
            model,
            self._settings,
            lambda: self._gate.available().available_bytes + going_bytes,
            None if budget_bytes is None else budget_bytes - kept_bytes,
            self._environ,
            self._blas,
        )
        # One model may have several names: a hub id and its directory. A name that means another
        # directory than before is another model.
        path = appraisal.estimate.path
        if path not in self._names:
            self._names[path] = path if model in self._manager.entries else model
        name = self._names[model] = self._names[path]
        return self._manager.register(name, appraisal)

    def _entry(self, model: str) -> Entry:
        check_model(model)
        name = self._names.get(model)
        if name is None:
            raise ModelNotLoadedError(f"{model} was never requested from this pool", model=model)
        return self._manager.entries[name]

    def _describe(self, entry: Entry) -> PoolModel:
        return describe(entry, self._manager.scheduler.waiting())

    def _new_process(self, appraisal: Appraisal) -> AsyncRunnerProcess:
        return AsyncRunnerProcess(
            appraisal.estimate.model,
            options=appraisal.options,
            require_full=True,
            gate=self._gate,
            timeouts=self._timeouts,
            blas=self._blas,
            env=self._env,
            log=self._log,
        )
