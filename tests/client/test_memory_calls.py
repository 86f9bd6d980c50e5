"""Estimate, trim and the memory figures of the sync client, against the fake runner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import RunnerClient, errors
from runner_client.testing import Failure, FakeRunner, fake_runner


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield fake


@pytest.fixture
def client(runner: FakeRunner) -> Iterator[RunnerClient]:
    with RunnerClient(runner.address) as made:
        yield made


def test_an_estimate_sends_its_arguments(client: RunnerClient, runner: FakeRunner) -> None:
    fields: dict[str, Any] = {
        "context_length": 64,
        "parallel": 2,
        "memory_limit_bytes": 10**9,
        "prefix_cache_bytes": 0,
    }
    client.estimate("org/name")
    estimate = client.estimate("org/name", dtype="auto_or_stored", **fields)
    assert (estimate.context_length, estimate.parallel, estimate.dtype) == (64, 2, "float32")
    assert (estimate.fits, estimate.notes) == (True, ())
    assert runner.requests == [
        pb.EstimateRequest(model="org/name", dtype=pb.DTYPE_AUTO),
        pb.EstimateRequest(model="org/name", dtype=pb.DTYPE_AUTO_OR_STORED, **fields),
    ]


def test_an_estimate_has_every_field_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: dict[str, Any] = {
        field.name: field.number
        for field in pb.EstimateResponse.DESCRIPTOR.fields
        if field.name not in ("fits", "dtype", "notes")
    }
    answer = pb.EstimateResponse(fits=True, dtype="float16", notes=["a", "b"], **numbers)
    monkeypatch.setattr(FakeRunner, "Estimate", lambda *_: answer)
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        estimate = asdict(client.estimate("org/name"))
    assert estimate == {**numbers, "fits": True, "dtype": "float16", "notes": ("a", "b")}


def test_memory_usage_has_every_field_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {field.name: field.number for field in pb.MemoryUsage.DESCRIPTOR.fields}
    answer = pb.StatusResponse(memory_usage=pb.MemoryUsage(**numbers))
    monkeypatch.setattr(FakeRunner, "Status", lambda *_: answer)
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        assert asdict(client.status().memory_usage) == numbers


def test_a_failed_estimate_raises_the_error_of_its_reason(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.failure = Failure("MODEL_NOT_FOUND", metadata={"model": "org/name"})
    with pytest.raises(errors.ModelNotFoundError):
        client.estimate("org/name")


@pytest.mark.parametrize("fields", [{"context_length": 2**31}, {"memory_limit_bytes": 2**63}])
def test_numbers_out_of_range_are_refused(client: RunnerClient, fields: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequestError, match=f"{next(iter(fields))}: .* is not in the"):
        client.estimate("org/name", **fields)
    with pytest.raises(errors.InvalidRequestError, match="cannot be sent"):
        client.trim(prefix_cache_bytes=2**63)


def test_trim_returns_the_freed_bytes(client: RunnerClient, runner: FakeRunner) -> None:
    runner.prefix_cache_bytes = 100
    assert client.trim(prefix_cache_bytes=70) == 30
    assert client.status().memory_usage.prefix_cache_bytes == 70
    assert client.trim() == 70
    assert runner.requests == [pb.TrimRequest(prefix_cache_bytes=70), pb.TrimRequest()]


def test_trim_during_a_load_is_refused(client: RunnerClient, runner: FakeRunner) -> None:
    runner.failure = Failure("BUSY")
    with pytest.raises(errors.BusyError):
        client.trim()
