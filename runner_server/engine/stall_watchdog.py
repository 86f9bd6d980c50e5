"""Notices an engine that stands still although it has work, and ends the process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_server.engine.engine import Engine

logger = logging.getLogger(__name__)

EXIT_STALLED = 71
"""The engine stood still; BSD's EX_OSERR, beside 70 for an engine that failed."""

_LOOKS_PER_LIMIT = 4
_MAX_LOOK_SECONDS = 5.0
_WORKING_SHARE = 0.02
"""Of one core. A CPU that computes a long step takes a core and more; a process that only waits,
and answers ``Status`` many times a second, stays below."""


class StallWatchdog:
    """Judges by what the engine tells of itself, and on a CPU by what the process takes.

    The engine moves with each part of a load, slice of a prompt and token, and tells no age
    while it has nothing to do. A step that is merely slow takes processor time on a CPU; on a
    GPU only the age tells.

    Args:
        engine: The engine.
        limit_seconds: How long it may stand still.
        on_stall: Called once, in words, when it does.
        cpu_seconds: Processor time of this process so far.
    """

    def __init__(
        self,
        engine: Engine,
        limit_seconds: float,
        on_stall: Callable[[str], None],
        cpu_seconds: Callable[[], float] = time.process_time,
    ) -> None:
        self._engine = engine
        self._limit_seconds = limit_seconds
        self._on_stall = on_stall
        self._cpu_seconds = cpu_seconds
        # Clock and processor time at the first look at which it stood still for too long.
        self._since: tuple[float, float, int] | None = None

    async def run(self) -> None:
        """Watch until the engine stands still."""
        look_seconds = min(_MAX_LOOK_SECONDS, self._limit_seconds / _LOOKS_PER_LIMIT)
        while True:
            await asyncio.sleep(look_seconds)
            if self.look(time.monotonic()):
                return

    def look(self, now: float) -> bool:
        """Look once; returns whether the engine stands still.

        Two looks must agree: a process that was stopped for a while and goes on looks
        like one that stands still, once.
        """
        state = self._engine.state()
        age, cpu = state.last_progress_age, self._cpu_seconds()
        if age is None or age < self._limit_seconds:
            self._since = None
            return False
        before, self._since = self._since, (now, cpu, state.step_count)
        if before is None or before[2] != state.step_count:
            return False
        if self._engine.device.startswith("cpu") and self._works(before, now, cpu):
            return False
        text = (
            f"the engine has stood still for {age:.0f} s with {state.running_count} running and "
            f"{state.queued_count} waiting completions (--stall-seconds "
            f"{self._limit_seconds:g}); the process exits with code {EXIT_STALLED}"
        )
        logger.critical("%s", text)
        self._on_stall(text)
        return True

    def _works(self, before: tuple[float, float, int], now: float, cpu: float) -> bool:
        return cpu - before[1] > _WORKING_SHARE * (now - before[0])
