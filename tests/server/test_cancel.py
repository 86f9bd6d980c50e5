"""A completion without a reader ends in every phase and leaves nothing."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from support.fakes import DEADLINE_SECONDS, PREFILL_CHUNK, says
from support.harness import Server, eventually, joined

LONG_PROMPT = "p" * (PREFILL_CHUNK * 40)


async def _wait_for_counts(server: Server, running: int, queued: int) -> None:
    async def reached() -> bool:
        status = await server.status()
        return (status.running_count, status.queued_count) == (running, queued)

    await eventually(reached)


async def test_a_cancel_while_queued(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    first, second = server.start("first", num_predict=3000), server.start("second")
    await _wait_for_counts(server, running=1, queued=1)
    second.cancel()

    async def gone() -> bool:
        server.backend.step_gate.allow()
        return (await server.status()).queued_count == 0

    await eventually(gone)
    assert (await server.status()).running_count == 1
    server.backend.step_gate.open()
    assert [message async for message in first][-1].eval_count == 3000
    await server.settled()
    await server.assert_nothing_left()


async def test_a_cancel_during_prefill_takes_effect_after_the_step(loaded: Server) -> None:
    gate = loaded.backend.step_gate
    gate.shut()
    call = loaded.start(LONG_PROMPT)
    gate.allow(2)
    assert (await anext(aiter(call))).HasField("prompt_progress")
    await loaded.thread(gate.wait_arrival)
    call.cancel()
    # The cancel arrives during a step and takes effect after it.
    await eventually(lambda: loaded.view.command_count == 1)
    gate.allow()
    await loaded.settled()
    await loaded.assert_nothing_left()
    assert loaded.backend.steps == 3


async def test_a_cancel_during_decode_takes_effect_after_the_step(loaded: Server) -> None:
    gate = loaded.backend.step_gate
    gate.shut()
    call = loaded.start("x")
    gate.allow(5)
    messages = aiter(call)
    while not (await anext(messages)).token_ids:
        pass
    await loaded.thread(gate.wait_arrival)
    steps = loaded.backend.steps
    call.cancel()
    await eventually(lambda: loaded.view.command_count == 1)
    gate.allow()
    await loaded.settled()
    assert loaded.backend.steps == steps + 1
    await loaded.assert_nothing_left()


async def test_a_cancel_in_the_step_of_the_end_is_harmless(loaded: Server) -> None:
    """Let the engine finish the row in a step while a cancel is already queued."""
    gate = loaded.backend.step_gate
    for _ in range(50):
        gate.shut()
        call = loaded.start("x", num_predict=1)
        gate.allow(1)  # the prompt
        await loaded.thread(gate.wait_arrival)
        call.cancel()
        await eventually(lambda: loaded.view.command_count == 1)
        gate.open()
        await loaded.settled()
        await eventually(lambda: not loaded.view.command_count)
    await loaded.assert_nothing_left()
    assert await loaded.text(num_predict=2)


async def test_a_cancel_after_the_end_does_nothing(loaded: Server) -> None:
    loaded.backend.reply = says("done")
    call = loaded.start()
    assert joined([message async for message in call]) == "done"
    assert not call.cancel()
    assert await loaded.text() == "done"


async def test_a_deadline_ends_a_request_like_a_cancel(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start("x", timeout=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [message async for message in call]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    loaded.backend.step_gate.open()
    await loaded.settled()
    await loaded.assert_nothing_left()


async def test_a_lost_connection_ends_its_requests(loaded: Server) -> None:
    async with grpc.aio.insecure_channel(loaded.ready.target) as channel:
        other = Server(loaded.app, loaded.backend, channel, loaded.ready)
        await anext(aiter(other.start("x", num_predict=4000)))
    await loaded.settled()
    await loaded.assert_nothing_left()


async def test_a_cancel_does_not_change_other_rows(loaded: Server) -> None:
    alone = await loaded.text("keep", seed=5, num_predict=60)
    keep = loaded.start("keep", seed=5, num_predict=60)
    for i in range(10):
        other = loaded.start(f"other {i}")
        await anext(aiter(other))
        other.cancel()
    assert joined([message async for message in keep]) == alone
    await loaded.settled()
    await loaded.assert_nothing_left()


@pytest.mark.slow
async def test_a_thousand_cancels_leave_nothing(server: Server) -> None:
    """Cancel in every phase, at random from a fixed seed; count tasks and rows afterwards."""
    await server.load(parallel=4)
    draw = random.Random(1)  # noqa: S311 - chooses phases
    before = len(asyncio.all_tasks())

    async def one() -> None:
        prompt = LONG_PROMPT if draw.random() < 0.4 else "x"
        call = server.start(prompt, num_predict=draw.choice([1, 5, 2000]))
        messages = aiter(call)
        try:
            for _ in range(draw.choice([0, 0, 1, 3])):
                await anext(messages)
        except StopAsyncIteration:
            return
        call.cancel()

    async with asyncio.timeout(DEADLINE_SECONDS * 2):
        for _ in range(50):
            await asyncio.gather(*(one() for _ in range(20)))
    await server.settled()
    await eventually(lambda: not server.view.command_count)
    await server.assert_nothing_left()
    await eventually(lambda: len(asyncio.all_tasks()) <= before)
    status = await server.status()
    assert (status.running_count, status.queued_count) == (0, 0)
    assert not status.HasField("last_progress_age")
    assert status.last_error == ""


async def test_an_idle_engine_makes_no_steps(loaded: Server) -> None:
    await loaded.complete(num_predict=3)
    steps = (await loaded.status()).step_count
    for _ in range(20):
        await loaded.status()
    assert not loaded.view.command_count
    assert (await loaded.status()).step_count == steps == loaded.backend.steps
