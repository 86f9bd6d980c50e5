"""The prefix cache in loads and answers, and the name of the BLAS in the status."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import RunnerClient
from runner_client.testing import FakeRunner, fake_runner


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield fake


@pytest.fixture
def client(runner: FakeRunner) -> Iterator[RunnerClient]:
    with RunnerClient(runner.address) as made:
        yield made


@pytest.mark.parametrize("size", [10**12, 0, None])
def test_a_prefix_cache_of_zero_differs_from_the_default(
    client: RunnerClient, runner: FakeRunner, size: int | None
) -> None:
    client.load("org/name", prefix_cache_bytes=size)
    asked = pb.LoadRequest(model="org/name", dtype=pb.DTYPE_AUTO, prefix_cache_bytes=size)
    assert runner.requests == [asked]
    assert asked.HasField("prefix_cache_bytes") == (size is not None)


def test_the_count_of_cached_prompt_tokens_is_returned(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.prompt_cached_count = 5
    chunks = list(client.completion("Hi"))
    assert [chunk.prompt_cached_count for chunk in chunks] == [0, 0, 5]
    assert client.complete("Hi").prompt_cached_count == 5


def test_the_status_has_the_prefix_cache_and_the_blas(
    client: RunnerClient, runner: FakeRunner
) -> None:
    assert client.status().blas == ""
    runner.prefix_cache_bytes, runner.blas = 2**40, "OpenBLAS (libopenblas.so.0)"
    status = client.status()
    assert status.memory_usage.prefix_cache_bytes == 2**40
    assert status.blas == "OpenBLAS (libopenblas.so.0)"
