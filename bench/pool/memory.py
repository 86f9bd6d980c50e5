"""Memory of all child processes over time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import psutil

from bench.children import children

INTERVAL_SECONDS = 0.25


@asynccontextmanager
async def sampled() -> AsyncIterator[list[tuple[float, int]]]:
    """Yield a list that receives time and proportional set of all children, at intervals.

    Times are in seconds since the start, sizes in bytes.
    """
    begin = time.monotonic()
    sizes: list[tuple[float, int]] = []

    async def sample() -> None:
        size = await asyncio.to_thread(_held_bytes)
        sizes.append((time.monotonic() - begin, size))

    await sample()
    sampling = asyncio.create_task(_repeat(sample))
    try:
        yield sizes
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)


async def _repeat(sample: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(INTERVAL_SECONDS)
        await sample()


def _held_bytes() -> int:
    return sum(child.pss_bytes for child in children(psutil.Process()))
