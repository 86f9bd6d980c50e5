"""Spare processes of a pool: start, hand over to a load, stop, and the policy for deaths."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING

from runner_client.errors import InsufficientMemoryError
from runner_client.pool.aio_tasks import soon
from runner_client.pool.scheduling.spares import PAUSE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner_client.pool.aio_tasks import Tasks
    from runner_client.pool.scheduling.spares import Spares
    from runner_client.pool.scheduling.states import Spare
    from runner_client.process.aio_spare import SpareProcess
    from runner_client.types import RestartPolicy

logger = logging.getLogger(__name__)


class SpareKeeper:
    """Executes the decisions about spare processes.

    Args:
        spares: The scheduler's view.
        restart_policy: How often they may die before no other is started for a while.
        new_process: Creates one, without starting it.
        stop: Stops one, and returns once its memory is back. Calls its second argument before, if
            enough for the load that waits is free.
        tasks: Runs starts and stops.
        notify: Has the scheduler decide again.
    """

    def __init__(
        self,
        spares: Spares,
        restart_policy: RestartPolicy,
        new_process: Callable[[], SpareProcess],
        stop: Callable[[SpareProcess, Callable[[], None]], Awaitable[object]],
        tasks: Tasks,
        notify: Callable[[], None],
    ) -> None:
        self._spares = spares
        self._restart_policy = restart_policy
        self._new_process = new_process
        self._stop = stop
        self._tasks = tasks
        self._notify = notify
        self._processes: dict[Spare, SpareProcess] = {}
        self._deaths: tuple[float, ...] = ()

    @property
    def processes(self) -> tuple[SpareProcess, ...]:
        """The processes not taken by a load."""
        return tuple(self._processes.values())

    @property
    def unreserved_bytes(self) -> int:
        """Memory of starts that the machine's reservations do not include yet."""
        starting = (spare for spare, each in self._processes.items() if not each.is_reserved)
        return sum(spare.held_bytes for spare in starting)

    def start(self, spare: Spare) -> None:
        """Start one."""
        process = self._processes[spare] = self._new_process()
        self._tasks.begin(self._start(spare, process))

    async def _start(self, spare: Spare, process: SpareProcess) -> None:
        try:
            await process.start()
        except Exception as error:  # noqa: BLE001 - a load that has taken it starts another
            self._note_gone(spare, error)
        else:
            spare.is_ready = True
            died = functools.partial(self._note_death, spare, process)
            process.on_exit(functools.partial(soon, asyncio.get_running_loop(), died))
        self._notify()

    def take(self, spare: Spare) -> SpareProcess:
        """Hand one over to a load, which waits for its start."""
        return self._processes.pop(spare)

    def end(self, spare: Spare, reason: str) -> None:
        """Stop one; its memory counts until it is back."""
        self._tasks.begin(self._end(spare, reason))

    async def _end(self, spare: Spare, reason: str) -> None:
        process = self._processes[spare]
        logger.info("stopping a spare process (pid %s): %s", process.pid, reason)

        def note_gone() -> None:
            if self._processes.pop(spare, None) is not None:
                self._spares.gone(spare)
                self._notify()

        try:
            await self._stop(process, note_gone)
        finally:
            note_gone()

    def _note_death(self, spare: Spare, process: SpareProcess) -> None:
        error = process.exit_error
        if error is not None and self._note_gone(spare, error):
            self._tasks.begin(process.close())
            self._notify()

    def _note_gone(self, spare: Spare, error: Exception) -> bool:
        """Note that one has not started or has died, unless it was taken or is being stopped."""
        if spare not in self._processes or spare.is_ending:
            return False
        logger.warning("a spare process is gone: %s", error)
        del self._processes[spare]
        self._spares.gone(spare)
        now, policy = time.monotonic(), self._restart_policy
        if isinstance(error, InsufficientMemoryError):
            self._spares.pause_until(now + PAUSE_SECONDS)
            return True
        self._deaths = recent = (*policy.recent(self._deaths, now), now)
        if len(recent) > policy.max_restarts:
            self._spares.pause_until(recent[-policy.max_restarts - 1] + policy.window_seconds)
        return True
