"""Load generator, shared by all contenders that are servers.

The load generator runs in the benchmark's process and never shares an interpreter with a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from bench.records import ContenderError, Record, Request

TAIL_SECONDS = 0.3
"""Time that background streams continue after the others have finished."""

Stream = Callable[[Request, Record], Awaitable[None]]
"""Send a request, filling the record as tokens arrive so that a cancelled stream keeps them."""


async def drive(stream: Stream, requests: Sequence[Request]) -> list[Record]:
    """Send each request at its scheduled time and wait for the foreground streams.

    Background streams are cancelled ``TAIL_SECONDS`` after the last foreground stream.

    Raises:
        ContenderError: A stream failed or returned the wrong number of tokens.
    """
    records = [Record() for _ in requests]
    tasks = [
        asyncio.create_task(_one(stream, request, record))
        for request, record in zip(requests, records, strict=True)
    ]
    lasting = [task for task, request in zip(tasks, requests, strict=True) if request.background]
    try:
        await asyncio.gather(*(task for task in tasks if task not in lasting))
        if lasting:
            await asyncio.wait(lasting, timeout=TAIL_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return records


async def _one(stream: Stream, request: Request, record: Record) -> None:
    if request.delay_seconds:
        await asyncio.sleep(request.delay_seconds)
    record.sent = time.monotonic()
    try:
        await stream(request, record)
    except asyncio.CancelledError as error:
        # gRPC also raises this when the server cancels the call; only a local cancel propagates.
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise ContenderError("the server cancelled the call") from error
    if not request.background:
        record.check(request)


async def poll(
    probe: Callable[[], Awaitable[None]], interval_seconds: float
) -> list[tuple[float, float]]:
    """Call ``probe`` repeatedly until cancelled.

    Returns:
        Start time and duration in seconds of each call.
    """
    answers: list[tuple[float, float]] = []
    try:
        while True:
            begin = time.monotonic()
            await probe()
            answers.append((begin, time.monotonic() - begin))
            await asyncio.sleep(interval_seconds)
    except asyncio.CancelledError:
        return answers
