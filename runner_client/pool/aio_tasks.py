"""Background tasks of a pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """Tasks that run on their own until a pool is closed."""

    def __init__(self) -> None:
        # The event loop keeps only weak references.
        self._running: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def join(self) -> None:
        """Wait until all have ended, and log failures. Cancelling the task cancels them."""
        try:
            # A task that is cancelled before it has begun would stop nothing.
            await asyncio.sleep(0)
            outcomes = await asyncio.gather(*self._running, return_exceptions=True)
        except asyncio.CancelledError:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            raise
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                logger.error("a runner was not stopped in order", exc_info=outcome)


def soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call a function on an event loop, from another thread."""
    # A closed event loop has no pool left.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)
