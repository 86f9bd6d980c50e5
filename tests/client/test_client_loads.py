"""Loads through RunnerClient against the fake runner: arguments, progress, time limits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import RunnerClient, errors
from runner_client.testing import FakeRunner
from runner_client.types import State, Status, Timeouts


def test_load_sends_its_arguments(client: RunnerClient, runner: FakeRunner) -> None:
    fields: dict[str, Any] = {"context_length": 64, "parallel": 2, "memory_limit_bytes": 10**9}
    fields["memory_override"] = fields["allow_inexact"] = True
    result = client.load("org/name", dtype="bfloat16", **fields)
    assert result.model.name == "org/name"
    assert runner.requests == [pb.LoadRequest(model="org/name", dtype=pb.DTYPE_BFLOAT16, **fields)]


def test_an_unknown_dtype_is_refused(client: RunnerClient) -> None:
    for call in (client.load, client.estimate):
        with pytest.raises(errors.InvalidRequestError, match="dtype: 'int3' is not one"):
            call("org/name", dtype="int3")  # type: ignore[arg-type]  # the point


def test_load_reports_its_progress(client: RunnerClient, runner: FakeRunner) -> None:
    runner.load_seconds = 1.0
    seen: list[Status] = []
    client.load("org/name", on_progress=seen.append)
    assert {status.state for status in seen} <= {State.LOADING, State.ACTIVE}
    progress = [status.progress for status in seen if status.state is State.LOADING]
    assert len(progress) >= 2
    assert progress == sorted(progress)


def test_a_load_that_makes_progress_has_no_time_limit(runner: FakeRunner) -> None:
    runner.load_seconds = 1.5
    with RunnerClient(runner.address, timeouts=Timeouts(load_seconds=0.7)) as client:
        assert client.load("org/name").model.name == "org/name"


def test_a_stalled_load_times_out_and_is_cancelled(runner: FakeRunner) -> None:
    runner.load_seconds = math.inf
    with RunnerClient(runner.address, timeouts=Timeouts(load_seconds=0.5)) as client:
        with pytest.raises(errors.RunnerTimeoutError, match="no progress") as caught:
            client.load("org/name")
        assert (caught.value.phase, caught.value.timeout_seconds) == ("load", 0.5)
        assert runner.cancelled.wait(10)


def test_a_started_load_goes_on_after_a_timeout(runner: FakeRunner) -> None:
    runner.load_seconds = math.inf
    with RunnerClient(runner.address, timeouts=Timeouts(load_seconds=0.5)) as client:
        load = client.start_load("org/name", parallel=2)
        for _ in range(2):
            with pytest.raises(errors.RunnerTimeoutError, match="no progress"):
                load.wait()
        assert not runner.cancelled.is_set()
        load.cancel()
        assert runner.cancelled.wait(10)
    assert runner.requests == [pb.LoadRequest(model="org/name", dtype=pb.DTYPE_AUTO, parallel=2)]


def test_an_exception_in_the_callback_cancels_the_load(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.load_seconds = math.inf

    def fail(_status: Status) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.load("org/name", on_progress=fail)
    assert runner.cancelled.wait(10)
