"""A pool's server in process, with real runners, reached over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from mlxrunner.v1 import pool_pb2, pool_pb2_grpc, runner_pb2_grpc
from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, LoadOptions, ModelSettings, PoolSettings
from runner_client.estimate import estimate
from runner_client.pool.serving.app import PoolApp
from runner_client.pool.serving.config import PoolServerConfig
from support.harness import Problem, failure

CONTEXT = 16_384
"""Room for completions that last until they are cancelled."""


@dataclass
class PoolServer:
    """A running server of a pool and a connected client."""

    app: PoolApp
    address: str
    channel: grpc.aio.Channel
    runner: runner_pb2_grpc.RunnerServiceAsyncStub
    pool: pool_pb2_grpc.PoolServiceAsyncStub

    async def models(self) -> dict[str, pool_pb2.PoolModel]:
        """Return the models by name."""
        listed = await self.pool.ListModels(pool_pb2.ListModelsRequest())
        return {model.name: model for model in listed.models}

    async def model(self, name: Path | str) -> pool_pb2.PoolModel:
        """Return one model."""
        return (await self.models())[str(name)]

    def complete(self, model: Path | str, count: int = 4, **fields: Any) -> Any:
        """Start a completion of ``count`` tokens, with the end-of-text token banned."""
        metadata = fields.pop("metadata", None)
        timeout = fields.pop("timeout", None)
        return self.runner.Completion(
            completion(model, count, **fields), metadata=metadata, timeout=timeout
        )

    def client(self, **options: Any) -> AsyncRunnerClient:
        """Return a client of the library for the pool's address."""
        return AsyncRunnerClient(self.address, **options)


def completion(model: Path | str, count: int = 4, **fields: Any) -> pb.CompletionRequest:
    """Return a request for ``count`` tokens, always the same ones."""
    options = pb.CompletionOptions(num_predict=count, logit_bias={0: -100}, temperature=0)
    return pb.CompletionRequest(
        **{"prompt": "def", "model": str(model), "options": options, **fields}
    )


def settings(*models: Path, budget_bytes: int | None = None, **changes: Any) -> PoolSettings:
    """Return settings for tests: small loads, and no wait between evictions."""
    options = LoadOptions(context_length=CONTEXT, parallel=4, prefix_cache_bytes=0)
    each = ModelSettings(options=options, **changes)
    return PoolSettings(
        budget_bytes=budget_bytes,
        default=each,
        models={str(model): each for model in models},
        min_residence_seconds=0.0,
        max_wait_seconds=1.0,
    )


@asynccontextmanager
async def serving(
    *models: Path, pool_settings: PoolSettings | None = None, **config: Any
) -> AsyncIterator[PoolServer]:
    """Run a pool's server for some configured models."""
    made = pool_settings or settings(*models)
    app = PoolApp(PoolServerConfig(settings=made, **config))
    ready = await app.start()
    try:
        async with grpc.aio.insecure_channel(
            ready.target, options=[("grpc.enable_http_proxy", 0)]
        ) as channel:
            yield PoolServer(
                app,
                ready.target,
                channel,
                runner_pb2_grpc.RunnerServiceStub(channel),
                pool_pb2_grpc.PoolServiceStub(channel),
            )
    finally:
        await app.close()


def need_bytes(model: Path) -> int:
    options = LoadOptions(context_length=CONTEXT, parallel=4, prefix_cache_bytes=0)
    return estimate(str(model), options=options).total_bytes


class Direct:
    """Calls to the runner of a loaded model, around the pool."""

    def __init__(self, server: PoolServer, model: Path) -> None:
        process = server.app.pool.member(str(model)).process
        assert process.address
        channel = grpc.aio.insecure_channel(process.address)
        self._stub = runner_pb2_grpc.RunnerServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {process.token}"),)

    def __call__(self, rpc: str, request: object) -> Any:
        """Start a call."""
        return getattr(self._stub, rpc)(request, metadata=self._metadata)


async def broken(call: Any) -> Problem:
    """Read a stream that has been read before, which must fail, and return the error."""
    return await failure(_rest(call))


async def _rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def running_count(server: PoolServer, model: Path) -> int:
    return (await server.runner.Status(pb.StatusRequest(model=str(model)))).running_count


async def is_idle(server: PoolServer, model: Path) -> bool:
    leases = (await server.model(model)).lease_count
    return not leases and not await running_count(server, model)


async def has_state(server: PoolServer, model: Path, state: int) -> bool:
    return (await server.model(model)).state == state
