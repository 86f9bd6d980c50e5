"""Watchdog that ends the process if the engine has work but makes no progress."""

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
"""Exit code after a stall; BSD's EX_OSERR. An engine that fails exits with 70."""

_LOOKS_PER_LIMIT = 4
_MAX_LOOK_SECONDS = 5.0
_WORKING_SHARE = 0.02
"""Share of one core above which the process is working. A long step on a CPU uses at least a core;
a process that hangs but answers ``Status`` many times a second stays below the share."""


class StallWatchdog:
    """Watches the engine's progress and, on a CPU, the CPU time of the process.

    Each part of a load, chunk of a prompt and decode step is progress; an idle engine cannot
    stall. On a CPU, a step that is merely slow is recognized by its CPU time. On a GPU only the
    time since the last progress counts.

    Args:
        engine: The engine.
        limit_seconds: Longest time without progress.
        on_stall: Called once with the reason when the engine has stalled.
        cpu_seconds: Returns the CPU time of this process.
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
        # Time, CPU time and steps at the previous check, if that check found no progress.
        self._since: tuple[float, float, int] | None = None

    async def run(self) -> None:
        """Watch until the engine stalls."""
        look_seconds = min(_MAX_LOOK_SECONDS, self._limit_seconds / _LOOKS_PER_LIMIT)
        while True:
            await asyncio.sleep(look_seconds)
            if self.look(time.monotonic()):
                return

    def look(self, now: float) -> bool:
        """Check once; return True if the engine has stalled.

        Two consecutive checks must agree, because a process that was suspended looks stalled in
        the first check after it continues.

        Args:
            now: Current time, in ``time.monotonic()`` seconds.
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
            f"the engine has made no progress for {age:.0f} s with {state.running_count} running "
            f"and {state.queued_count} waiting completions (--stall-seconds "
            f"{self._limit_seconds:g}); the process exits with code {EXIT_STALLED}"
        )
        logger.critical("%s", text)
        self._on_stall(text)
        return True

    def _works(self, before: tuple[float, float, int], now: float, cpu: float) -> bool:
        return cpu - before[1] > _WORKING_SHARE * (now - before[0])
