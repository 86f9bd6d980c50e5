"""A real model under hostile requests, with a neighbour stream checked for interference."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Server, joined, running

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
CONTEXT_LENGTH = 96
NEIGHBOUR: dict[str, Any] = {"seed": 11, "num_predict": 40, "logit_bias": {0: -100.0}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real() -> AsyncIterator[Server]:
    """One server with the trained demo model, which must survive every case."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    from runner_server.mlx_backend import MlxBackend

    directory = Path(tempfile.mkdtemp(prefix="mr-"))
    backend: Any = MlxBackend()
    try:
        async with running(directory, backend) as (app, channel, ready):
            server = Server(app, backend, channel, ready)
            await server.load(str(DEMO), context_length=CONTEXT_LENGTH)
            yield server
    finally:
        shutil.rmtree(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(real: Server) -> str:
    """The neighbour's text without other requests."""
    return await real.text("def main", **NEIGHBOUR)


@pytest_asyncio.fixture(loop_scope="module")
async def target(real: Server, alone: str) -> AsyncIterator[Server]:
    """The server beside a neighbour: a seeded stream, compared with the one decoded alone."""
    call = real.start("def main", **NEIGHBOUR)
    messages = [await anext(aiter(call))]
    before = await real.status()
    yield real
    messages += [message async for message in call]
    assert joined(messages) == alone
    status = await real.status()
    assert (status.state, status.running_count, status.queued_count) == (pb.STATE_ACTIVE, 0, 0)
    assert status.last_error == before.last_error
    assert await real.health() == health_pb2.HealthCheckResponse.SERVING
