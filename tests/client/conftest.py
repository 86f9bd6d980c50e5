"""Fixtures with a fake runner and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from runner_client import RunnerClient
from runner_client.testing import FakeRunner, fake_runner


@pytest.fixture(params=["tcp", "unix"])
def runner(request: pytest.FixtureRequest) -> Iterator[FakeRunner]:
    """A fake runner, over TCP and over a unix socket."""
    listen: Literal["tcp", "unix"] = request.param
    with fake_runner(listen=listen) as fake:
        yield fake


@pytest.fixture
def client(runner: FakeRunner) -> Iterator[RunnerClient]:
    """A client of the fake runner."""
    with RunnerClient(runner.address) as made:
        yield made
