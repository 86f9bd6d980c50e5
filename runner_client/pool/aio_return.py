"""Verified return of the memory of stopped runners."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner_client.pool.aio_member import Member
    from runner_client.pool.types import MemoryReturn

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05


class MemoryReturns:
    """Stops runners, and measures until their memory is back.

    Other programs take memory meanwhile, so the measured return can be too small. Therefore a load
    that waits for the memory begins as soon as enough is free, wherever it came from, and the
    measurement goes on for the report.

    Args:
        return_seconds: How long to wait for the memory after an exit.
        others_bytes: Returns the memory of all runners of the pool but one.
        is_closed: Returns whether the pool stops, which needs the memory for nothing.
        is_enough: Returns whether a load waits for memory, and enough for it is free.
    """

    def __init__(
        self,
        return_seconds: float,
        others_bytes: Callable[[Member], int],
        is_closed: Callable[[], bool],
        is_enough: Callable[[], Awaitable[bool]],
    ) -> None:
        self._return_seconds = return_seconds
        self._others_bytes = others_bytes
        self._is_closed = is_closed
        self._is_enough = is_enough

    async def stop(self, member: Member, name: str, on_enough: Callable[[], None]) -> MemoryReturn:
        """Stop a runner, wait for the return of its memory, and log the figures.

        Args:
            member: The runner.
            name: What to call the runner in the log.
            on_enough: Called, at most once, when enough memory is free for the load that waits,
                although the runner's is not back.
        """
        departure = await member.stop(lambda: self._others_bytes(member))
        was_enough = False
        while True:
            returned = await departure.returned()
            is_over = self._is_closed() or returned.seconds >= self._return_seconds
            if returned.is_complete or is_over:
                break
            if not was_enough and await self._is_enough():
                was_enough = True
                on_enough()
            await asyncio.sleep(_LOOK_SECONDS)
        is_late = not (returned.is_complete or self._is_closed())
        level = logging.WARNING if is_late else logging.INFO
        logger.log(level, "evicted %s: %s", name, returned)
        return returned
