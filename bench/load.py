"""The load generator: the same for every contender that is served.

It runs in the benchmark's process, so it never shares an interpreter with a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from bench.records import ContenderError, Record, Request

TAIL_SECONDS = 0.3
"""How long background streams go on after the others."""

Stream = Callable[[Request, Record], Awaitable[None]]
"""Sends a request and fills the record as tokens come, so that a cancelled one keeps them."""


async def drive(stream: Stream, requests: Sequence[Request]) -> list[Record]:
    """Sends all requests, each at its time; returns when all but the background ones are done.

    Raises:
        ContenderError: A stream failed, or did not bring what it was asked for.
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
        # gRPC raises this too when the server ends a call as cancelled: not our own doing.
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise ContenderError("the server cancelled the call") from error
    if not request.background:
        record.check(request)


async def poll(
    probe: Callable[[], Awaitable[None]], interval_seconds: float
) -> list[tuple[float, float]]:
    """Calls a probe again and again until it is cancelled.

    Returns:
        For each call: when it began, and how many seconds it took.
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
