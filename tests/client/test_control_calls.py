"""Calls that end completions or refuse new ones, on the fake runner."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, RunnerClient, errors
from runner_client.testing import FakeRunner, fake_runner
from runner_client.types import DrainResult, State
from support.fake_child import wait_until


def test_an_aborted_completion_raises(client: RunnerClient, runner: FakeRunner) -> None:
    runner.stall_after = 1
    stream = client.completion("Hi", request_id="one")
    assert next(stream).content == "Hello"
    assert client.abort(["other"]) == 0
    assert client.abort(("one", "other")) == 1
    with pytest.raises(errors.RequestAbortedError, match="Abort") as caught:
        next(stream)
    assert caught.value.reason == "ABORTED"
    assert client.abort(["one"]) == 0
    assert not runner.cancelled.is_set()
    assert runner.requests[1] == pb.AbortRequest(request_ids=["other"])


async def test_an_aborted_completion_raises_in_asyncio() -> None:
    with fake_runner() as runner:
        runner.stall_after = 1
        async with AsyncRunnerClient(runner.address) as client:
            stream = client.completion("Hi", request_id="one")
            assert (await anext(stream)).content == "Hello"
            assert await client.abort(["one"]) == 1
            with pytest.raises(errors.RequestAbortedError):
                await asyncio.wait_for(anext(stream), 20)


def test_a_single_string_is_not_a_sequence_of_ids(client: RunnerClient) -> None:
    with pytest.raises(TypeError, match=r"request_ids=\('one',\)"):
        client.abort("one")


def test_a_drain_waits_for_running_completions(client: RunnerClient, runner: FakeRunner) -> None:
    pieces = runner.pieces
    runner.pieces, runner.piece_delay_seconds = ("Hello",) * 200, 0.05
    stream = client.completion("Hi")
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(client.drain)
        wait_until(lambda: runner.is_draining)
        assert not drained.done()
        runner.pieces, runner.piece_delay_seconds = pieces, 0.0
        assert drained.result(20) == DrainResult(finished_count=1, aborted_count=0)
    assert [chunk.done for chunk in stream][-1]
    assert client.status().state is State.DRAINING
    with pytest.raises(errors.ShuttingDownError):
        client.complete("Hi")
    client.load("model")
    assert client.status().state is State.ACTIVE
    assert client.complete("Hi").content == "Hello world"


def test_a_drain_ends_completions_by_its_timeout(client: RunnerClient, runner: FakeRunner) -> None:
    runner.stall_after = 1
    stream = client.completion("Hi")
    next(stream)
    assert client.drain(0.01) == DrainResult(finished_count=0, aborted_count=1)
    with pytest.raises(errors.RequestAbortedError):
        next(stream)
    sent = runner.requests[-1]
    assert isinstance(sent, pb.DrainRequest)
    assert sent.timeout.ToNanoseconds() == 10_000_000


async def test_a_cancelled_drain_accepts_completions_again() -> None:
    with fake_runner() as runner:
        runner.stall_after = 1
        async with AsyncRunnerClient(runner.address) as client:
            stream = client.completion("Hi")
            await anext(stream)
            task = asyncio.create_task(client.drain())
            async with asyncio.timeout(20):
                while (await client.status()).state is not State.DRAINING:
                    pass
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                while (await client.status()).state is not State.ACTIVE:
                    pass


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, 1e300])
def test_a_timeout_that_cannot_be_sent_is_refused(client: RunnerClient, seconds: float) -> None:
    with pytest.raises(errors.InvalidRequestError, match="timeout_seconds"):
        client.drain(seconds)
