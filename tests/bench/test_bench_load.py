"""Load generator driving fake streams."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import pytest

from bench.load import drive, poll
from bench.measures.open_loop import at_random
from bench.records import ContenderError, Prompt, Record, Request

_PROMPT = Prompt(" a", (1,))


async def _answer(request: Request, record: Record) -> None:
    for _ in range(request.max_tokens):
        record.chunks.append((time.monotonic(), 1))
        record.completion_tokens += 1
        await asyncio.sleep(0)
    record.prompt_tokens = len(request.prompt.token_ids)


async def test_every_request_gets_its_record() -> None:
    records = await drive(_answer, [Request(_PROMPT, 2), Request(_PROMPT, 5)])
    assert [record.completion_tokens for record in records] == [2, 5]
    assert all(0 < record.sent <= record.first <= record.last for record in records)


async def test_a_background_stream_ends_after_the_others_and_keeps_its_chunks() -> None:
    endless = Request(_PROMPT, 10**9, background=True)
    background, arriving = await drive(_answer, [endless, Request(_PROMPT, 3, delay_seconds=0.02)])
    assert arriving.sent - background.sent >= 0.02
    assert background.first < arriving.sent
    assert background.last > arriving.last


async def test_a_failed_stream_fails_the_run() -> None:
    async def fail(request: Request, record: Record) -> None:
        if request.max_tokens == 1:
            raise ContenderError("it broke")
        await _answer(request, record)

    with pytest.raises(ContenderError, match="it broke"):
        await drive(fail, [Request(_PROMPT, 10**9), Request(_PROMPT, 1)])


async def test_a_failed_background_stream_fails_the_run() -> None:
    async def fail(request: Request, record: Record) -> None:
        await _answer(request, record)
        if request.background:
            raise ContenderError("it broke")

    with pytest.raises(ContenderError, match="it broke"):
        await drive(fail, [Request(_PROMPT, 1, background=True), Request(_PROMPT, 100)])


async def test_a_call_cancelled_by_the_server_fails_the_run() -> None:
    async def cancelled(_: Request, __: Record) -> None:
        raise asyncio.CancelledError

    with pytest.raises(ContenderError, match="the server cancelled the call"):
        await drive(cancelled, [Request(_PROMPT, 1)])


async def test_a_cancelled_run_is_cancelled() -> None:
    task = asyncio.create_task(drive(_answer, [Request(_PROMPT, 10**9)]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_too_few_tokens_fail_the_run() -> None:
    async def stop_early(request: Request, record: Record) -> None:
        await _answer(Request(request.prompt, request.max_tokens - 1), record)

    with pytest.raises(ContenderError, match="expected 3 tokens for a prompt of 1, got 2"):
        await drive(stop_early, [Request(_PROMPT, 3)])


async def test_poll_returns_every_call_once_cancelled() -> None:
    third = asyncio.Event()
    calls = 0

    async def probe() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            third.set()

    task = asyncio.create_task(poll(probe, 0.001))
    await asyncio.wait_for(third.wait(), 5)
    await asyncio.sleep(0)
    task.cancel()
    answers = await task
    assert len(answers) >= 3
    assert all(latency >= 0 for _, latency in answers)


def test_requests_at_random_keep_their_pattern_at_every_rate() -> None:
    requests = [Request(_PROMPT, 4) for _ in range(2000)]
    slow, fast = (at_random(requests, rate, seed=3) for rate in (2.0, 20.0))
    times = [request.delay_seconds for request in slow]
    assert [round(10 * request.delay_seconds, 9) for request in fast] == pytest.approx(times)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    # Those of a Poisson process have a standard deviation equal to their mean.
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.1)
    assert times == sorted(times)
