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
from runner_client.memory.estimation import BARE_PROCESS_BYTES
from runner_client.pool.aio_entry import Entry
from runner_client.pool.aio_member import Member
from runner_client.pool.aio_return import MemoryReturns
from runner_client.pool.aio_spares import SpareKeeper
from runner_client.pool.aio_tasks import Tasks, soon
from runner_client.pool.scheduling.scheduler import PoolScheduler
from runner_client.pool.scheduling.states import (
    EndSpare,
    Evict,
    Grant,
    Load,
    ModelState,
    Refuse,
    StartSpare,
)
from runner_client.pool.types import NOTHING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from runner_client.memory.gate import MemoryGate
    from runner_client.pool.appraisal import Appraisal
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.scheduling.states import Action, Lease, Spare, Ticket
    from runner_client.process.aio_process import AsyncRunnerProcess
    from runner_client.process.aio_spare import SpareProcess
    from runner_client.types import RestartPolicy

logger = logging.getLogger(__name__)

_MAX_REFUSALS = 5
"""How often the machine may refuse a load for which the pool found room, before the requests for
it fail. Other schedulers take memory at the same moment."""


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
        new_spare: Creates a spare process, without starting it.
    """

    def __init__(
        self,
        settings: PoolSettings,
        gate: MemoryGate,
        restart_policy: RestartPolicy,
        new_process: Callable[[Appraisal], AsyncRunnerProcess],
        new_spare: Callable[[], SpareProcess],
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._restart_policy = restart_policy
        self._new_process = new_process
        self.scheduler = PoolScheduler(settings, BARE_PROCESS_BYTES)
        self.entries: dict[str, Entry] = {}
        self._closed_because = ""
        self._waiting: dict[Ticket, _Wait] = {}
        self._tasks = Tasks()
        self._returns = MemoryReturns(
            settings.return_seconds, self._taken_bytes, lambda: self.is_closed, self._is_enough
        )
        self.spares = SpareKeeper(
            self.scheduler.spares,
            restart_policy,
            new_spare,
            lambda process, on_enough: self._returns.stop(
                Member(process, gate), "a spare process", on_enough
            ),
            self._tasks,
            self.notify,
        )
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
        text = entry.refusal(self._restart_policy, time.monotonic())
        return RunnerUnavailableError(text) if text else None

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
        entry.task = self._tasks.begin(self._evict(entry, loading, reason))
        self.notify()

    def end_spare(self, reason: str) -> bool:
        """Stop a spare process; return False if there is none."""
        action = self.scheduler.spares.end_one(time.monotonic(), reason)
        self._carry_out([action] if action else [])
        return action is not None

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
            room = await self._measure()
            if self.is_closed:
                # A process that is started now would not be stopped.
                return
            self._carry_out(self.scheduler.decide(time.monotonic(), *room))
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
        while self.end_spare("the pool is closed"):
            pass
        await self._tasks.join()

    async def _measure(self) -> tuple[int, int]:
        """Measure the memory for another runner, and the part that spare processes leave free.

        The needs of starts not yet admitted are deducted. Both are 0 if no decision needs them.
        """
        if not (self.scheduler.is_short or self.scheduler.wants_spare(time.monotonic())):
            return 0, 0
        # Before the measurement: a load admitted meanwhile counts twice rather than not at all.
        begun = self.spares.unreserved_bytes + sum(
            entry.member.unreserved_bytes(entry.model.need.total_bytes)
            for entry in self.entries.values()
            if entry.model.state is ModelState.LOADING and entry.member
        )
        decision = await asyncio.to_thread(self._gate.available)
        reserve_bytes = (self._settings.reserve_bytes or 0) - decision.overhead_bytes
        return decision.available_bytes - begun, max(0, reserve_bytes)

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
                case Load(model, spare):
                    self._begin_load(self.entries[model.name], spare)
                case Evict(model, reason):
                    self.begin_eviction(self.entries[model.name], reason)
                case StartSpare(spare):
                    self.spares.start(spare)
                case EndSpare(spare, reason):
                    self.spares.end(spare, reason)

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

    def _begin_load(self, entry: Entry, spare: Spare | None) -> None:
        entry.member = self._new_member(entry.appraisal, spare)
        entry.task = self._tasks.begin(self._load(entry, entry.member))

    def _new_member(self, appraisal: Appraisal, spare: Spare | None) -> Member:
        if spare is None:
            return Member(self._new_process(appraisal), self._gate)
        process = self.spares.take(spare)
        process.choose(appraisal.estimate.model, appraisal.options)
        return Member(process, self._gate, spare.held_bytes)

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
            member.process.on_exit(functools.partial(soon, asyncio.get_running_loop(), died))
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
        self._tasks.begin(member.process.close())
        self.notify()

    async def _evict(self, entry: Entry, loading: asyncio.Task[None] | None, reason: str) -> None:
        name, member, life = entry.model.name, entry.member, entry.model.life
        logger.info("evicting %s: %s", name, reason)

        def note_gone() -> None:
            # Not that of a load that has begun since enough memory was free.
            if entry.model.life == life and entry.model.state is ModelState.EVICTING:
                entry.member = None
                self.scheduler.gone(entry.model)
                self.notify()

        try:
            if loading is not None:
                entry.last_return = NOTHING
                await asyncio.gather(loading, return_exceptions=True)
            elif member is not None:
                returned = entry.last_return = await self._returns.stop(member, name, note_gone)
                if entry.model.life == life:
                    is_back = returned.is_complete
                    entry.last_error = "" if is_back else f"evicted, but only {returned}"
        finally:
            note_gone()

    async def _is_enough(self) -> bool:
        """Return whether a load waits for memory, and enough is free for it."""
        machine_bytes, _ = await self._measure()
        return self.scheduler.fits_next(machine_bytes)

    def _taken_bytes(self, member: Member) -> int:
        """Return the memory of all runners but one."""
        members = [entry.member for entry in list(self.entries.values()) if entry.member]
        members += (Member(process, self._gate) for process in self.spares.processes)
        return sum(each.taken_bytes for each in members if each.process is not member.process)
