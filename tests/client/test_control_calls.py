"""Calls that end completions, on the fake runner."""

from __future__ import annotations

import asyncio

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, RunnerClient, errors
from runner_client.testing import FakeRunner, fake_runner


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
