"""Execution of a scheduler's decisions: start, stop and watch runners."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_client.errors import (
    InsufficientMemoryError,
    RunnerExitedError,
    RunnerUnavailableError,
)
from runner_client.pool.aio_member import Member
from runner_client.pool.scheduling.scheduler import PoolScheduler
from runner_client.pool.scheduling.states import Evict, Grant, Load, ModelState, Refuse
from runner_client.pool.types import NOTHING, MemoryReturn

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
    from typing import Any

    from runner_client.memory.gate import MemoryGate
    from runner_client.pool.appraisal import Appraisal
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.scheduling.states import Action, Lease, PooledModel, Ticket
    from runner_client.process.aio_process import AsyncRunnerProcess
    from runner_client.types import RestartPolicy

logger = logging.getLogger(__name__)

_MAX_REFUSALS = 5
"""How often the machine may refuse a load for which the pool found room, before the requests for
it fail. Other schedulers take memory at the same moment."""


@dataclass(slots=True, eq=False)
class Entry:
    """A model of a pool: the scheduler's view, the runner and the history.

    Attributes:
        model: The scheduler's view.
        appraisal: The need and the options of the next load.
        member: The runner; None while the model is absent.
        task: The load or eviction in progress, or the last one.
        deaths: Times at which a runner of the model died, in ``time.monotonic()`` seconds.
        last_error: Why the last load failed, the last runner died, or memory did not come back.
        refused_count: Loads in a row that the machine refused.
        last_return: Memory that came back at the last eviction.
        last_reason: What the last request that gave up had waited for.
    """

    model: PooledModel
    appraisal: Appraisal
    member: Member | None = None
    task: asyncio.Task[None] | None = None
    deaths: tuple[float, ...] = ()
    last_error: str = ""
    refused_count: int = 0
    last_return: MemoryReturn = NOTHING
    last_reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    granted: asyncio.Future[Lease | None]
    on_change: Callable[[], None] | None


class PoolManager:
    """Executes the decisions of the scheduler, which decides after every event.

    Everything runs on one event loop. ``run`` must run for as long as there are requests.

    Args:
        settings: The settings of the pool.
        gate: Measures the machine's memory.
        restart_policy: How often a model's runner may die.
        new_process: Creates the process for a model, without starting it.
    """

    def __init__(
        self,
        settings: PoolSettings,
        gate: MemoryGate,
        restart_policy: RestartPolicy,
        new_process: Callable[[Appraisal], AsyncRunnerProcess],
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._restart_policy = restart_policy
        self._new_process = new_process
        self.scheduler = PoolScheduler(settings)
        self.entries: dict[str, Entry] = {}
        self._closed_because = ""
        self._waiting: dict[Ticket, _Wait] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._event = asyncio.Event()
        self._watchers: set[asyncio.Event] = set()

    @property
    def is_closed(self) -> bool:
        """True once all requests are refused."""
        return bool(self._closed_because)

    def register(self, name: str, appraisal: Appraisal) -> Entry:
        """Return the entry of a model. A new appraisal takes effect with the next load."""
        model = self.scheduler.model(name, appraisal.settings, appraisal.need)
        entry = self.entries.setdefault(name, Entry(model, appraisal))
        if not model.is_held:
            entry.appraisal = appraisal
        return entry

    async def request(
        self,
        entry: Entry,
        *,
        may_evict: bool,
        is_lease: bool,
        on_change: Callable[[], None] | None = None,
    ) -> Lease | None:
        """Lease a model, after loading it if necessary.

        Args:
            entry: The model.
            may_evict: Whether other models may be evicted for it.
            is_lease: Whether to lease it; otherwise it is only loaded, and the result is None.
            on_change: Called after each decision. An exception in it ends the wait.

        Raises:
            InsufficientMemoryError: The model does not fit.
            RunnerUnavailableError: The pool was closed, or the model's runners keep dying.
            RunnerError: The load failed.
        """
        if refusal := self._refusal(entry):
            raise refusal
        if not self.scheduler.waiting(entry.model):
            entry.refused_count = 0
        now = time.monotonic()
        ticket = self.scheduler.request(now, entry.model, may_evict=may_evict, is_lease=is_lease)
        granted: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = _Wait(granted, on_change)
        try:
            # A loaded model needs no measurement, and no turn of the loop.
            self._carry_out(self.scheduler.grants(now))
            self.notify()
            return await granted
        except BaseException:
            entry.last_reason = ticket.reason
            self._give_back(ticket, granted)
            raise
        finally:
            del self._waiting[ticket]

    def _refusal(self, entry: Entry) -> RunnerUnavailableError | None:
        """Return why no request is accepted: the pool is closed, or the runners keep dying."""
        if self._closed_because:
            return RunnerUnavailableError(self._closed_because)
        policy, now = self._restart_policy, time.monotonic()
        recent = policy.recent(entry.deaths, now)
        if len(recent) <= policy.max_restarts:
            return None
        rest = recent[-policy.max_restarts - 1] + policy.window_seconds - now
        return RunnerUnavailableError(
            f"runners of {entry.model.name} have died {len(recent)} times within "
            f"{policy.window_seconds:g} s; it is refused for another {rest:.0f} s. The last one: "
            f"{entry.last_error}"
        )

    def _give_back(self, ticket: Ticket, granted: asyncio.Future[Lease | None]) -> None:
        """Take back the request of a caller that is gone, and a lease granted at that moment."""
        self.scheduler.cancel(ticket)
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self.release(granted.result())
        self.notify()

    def release(self, lease: Lease | None) -> None:
        """End a lease."""
        if lease is not None:
            self.scheduler.release(time.monotonic(), lease)
        self.notify()

    def begin_eviction(self, entry: Entry, reason: str) -> None:
        """Stop a runner, or cancel the load in progress."""
        self.scheduler.evict(entry.model)
        loading = entry.task if entry.task and not entry.task.done() else None
        if loading is not None:
            # Now, so that it cannot end in another way before the eviction begins.
            loading.cancel()
        entry.task = self._begin(self._evict(entry, loading, reason))
        self.notify()

    def notify(self) -> None:
        """Have the scheduler decide again, soon."""
        self._event.set()

    async def watch(self) -> AsyncGenerator[None]:
        """Yield now and after each change, until the pool is closed. Changes may be merged."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self.is_closed:
                changed.clear()
                yield
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    async def run(self) -> None:
        """Decide after every event, until cancelled."""
        while True:
            self._event.clear()
            machine_bytes = await self._machine_bytes() if self.scheduler.is_short else 0
            self._carry_out(self.scheduler.decide(time.monotonic(), machine_bytes))
            self._publish()
            now = time.monotonic()
            delay = self.scheduler.next_decision(now) - now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if delay == math.inf else delay):
                    await self._event.wait()

    def refuse_all(self, text: str) -> None:
        """Fail all pending and future requests.

        Args:
            text: The message of the ``RunnerUnavailableError``.
        """
        self._closed_because = text
        self._fail(self.scheduler.waiting(), RunnerUnavailableError(text))
        self._publish()

    async def close(self) -> None:
        """Refuse all requests, and stop all runners. Cancelling the task kills them."""
        self.refuse_all("the pool is closed")
        for entry in self.entries.values():
            if entry.model.is_held:
                self.begin_eviction(entry, "the pool is closed")
        try:
            # A task that is cancelled before it has begun would stop nothing.
            await asyncio.sleep(0)
            outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                logger.error("a runner was not stopped in order", exc_info=outcome)

    async def _machine_bytes(self) -> int:
        """Measure the memory for another runner, less the needs of loads not yet admitted."""
        # Before the measurement: a load admitted meanwhile counts twice rather than not at all.
        begun = sum(
            entry.model.need.total_bytes
            for entry in self.entries.values()
            if entry.model.state is ModelState.LOADING
            and not (entry.member and entry.member.is_admitted)
        )
        decision = await asyncio.to_thread(self._gate.available)
        return decision.available_bytes - begun

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Grant(ticket, lease):
                    self._grant(ticket, lease)
                case Refuse(ticket, required_bytes, available_bytes, text):
                    error = InsufficientMemoryError(
                        text, required_bytes=required_bytes, available_bytes=available_bytes
                    )
                    self._fail([ticket], error)
                case Load(model):
                    self._begin_load(self.entries[model.name])
                case Evict(model, reason):
                    self.begin_eviction(self.entries[model.name], reason)

    def _grant(self, ticket: Ticket, lease: Lease | None) -> None:
        wait = self._waiting.get(ticket)
        if wait is None or wait.granted.done():
            # The caller is gone, and has not taken the request back yet.
            self.release(lease)
        else:
            wait.granted.set_result(lease)

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in tickets:
            self.scheduler.cancel(ticket)
            wait = self._waiting.get(ticket)
            if wait is not None and not wait.granted.done():
                wait.granted.set_exception(error)

    def _publish(self) -> None:
        """Tell watchers and waiting callers that something may have changed."""
        for changed in self._watchers:
            changed.set()
        for wait in list(self._waiting.values()):
            if wait.on_change is None or wait.granted.done():
                continue
            try:
                wait.on_change()
            except Exception as error:  # noqa: BLE001 - raised in the caller's task
                wait.granted.set_exception(error)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        # The event loop keeps only weak references.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin_load(self, entry: Entry) -> None:
        entry.member = Member(self._new_process(entry.appraisal), self._gate)
        entry.task = self._begin(self._load(entry, entry.member))

    async def _load(self, entry: Entry, member: Member) -> None:
        logger.info("loading %s", entry.model.name)
        try:
            held_bytes = await member.load(self.notify, entry.model.need.total_bytes)
        except InsufficientMemoryError as error:
            # Another scheduler took the memory: measure and decide again.
            entry.refused_count += 1
            self._note_gone(entry, error, is_failure=entry.refused_count >= _MAX_REFUSALS)
        except Exception as error:  # noqa: BLE001 - raised in the callers' tasks
            if isinstance(error, RunnerExitedError):
                entry.deaths = (*entry.deaths, time.monotonic())
            self._note_gone(entry, error, is_failure=True)
        else:
            entry.refused_count, entry.last_error = 0, ""
            self.scheduler.loaded(time.monotonic(), entry.model, held_bytes)
            died = functools.partial(self._note_death, entry, member)
            member.process.on_exit(functools.partial(_soon, asyncio.get_running_loop(), died))
        self.notify()

    def _note_gone(self, entry: Entry, error: Exception, *, is_failure: bool) -> None:
        """Note that a model is absent, and fail its requests if they cannot be served."""
        logger.warning("%s is not loaded: %s", entry.model.name, error)
        entry.member, entry.last_error = None, str(error)
        self.scheduler.gone(entry.model)
        if is_failure:
            entry.refused_count = 0
            self._fail(self.scheduler.waiting(entry.model), error)

    def note_exit(self, entry: Entry) -> None:
        """Note the death of a model's runner now, if it is dead."""
        if entry.member is not None and entry.member.process.exit_error:
            self._note_death(entry, entry.member)

    def _note_death(self, entry: Entry, member: Member) -> None:
        """Note that a runner died while its model was loaded. Requests that wait get a new one."""
        if entry.member is not member or entry.model.state is not ModelState.READY:
            return
        entry.deaths = (*entry.deaths, time.monotonic())
        error = member.process.exit_error or RunnerUnavailableError("the runner is gone")
        self._note_gone(entry, error, is_failure=False)
        if refusal := self._refusal(entry):
            self._fail(self.scheduler.waiting(entry.model), refusal)
        self._begin(member.process.close())
        self.notify()

    async def _evict(self, entry: Entry, loading: asyncio.Task[None] | None, reason: str) -> None:
        name, member = entry.model.name, entry.member
        logger.info("evicting %s: %s", name, reason)
        try:
            if loading is not None:
                entry.last_return = NOTHING
                await asyncio.gather(loading, return_exceptions=True)
            elif member is not None:
                others = functools.partial(self._taken_bytes, member)
                # A pool that stops needs the memory for nothing.
                patience = 0.0 if self.is_closed else self._settings.return_seconds
                returned = await member.stop(patience, others)
                entry.last_return = returned
                entry.last_error = "" if returned.is_complete else f"evicted, but only {returned}"
                is_late = not (returned.is_complete or self.is_closed)
                level = logging.WARNING if is_late else logging.INFO
                logger.log(level, "evicted %s: %s", name, returned)
        finally:
            entry.member = None
            self.scheduler.gone(entry.model)
            self.notify()

    def _taken_bytes(self, member: Member) -> int:
        """Return the memory of all other runners."""
        members = [entry.member for entry in list(self.entries.values())]
        return sum(each.taken_bytes for each in members if each and each is not member)


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    # A closed event loop has no pool left.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)
