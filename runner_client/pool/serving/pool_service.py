"""``PoolService``: reports and controls a pool."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import pool_pb2 as pb
from mlxrunner.v1 import pool_pb2_grpc
from runner_client.errors import ModelNotLoadedError, RunnerUnavailableError
from runner_client.pool.serving.messages import model_message, pool_message, without_times
from runner_client.pool.types import NOTHING
from runner_common.contract import POOL_SERVICE_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from runner_client.pool.aio_pool import AsyncRunnerPool
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.serving.completions import Completions
    from runner_client.pool.serving.names import ModelNames
    from runner_client.pool.types import MemoryReturn

    Context = grpc.aio.ServicerContext[Any, Any]

METHODS = frozenset(
    f"/{POOL_SERVICE_NAME}/{name}"
    for name in pb.DESCRIPTOR.services_by_name["PoolService"].methods_by_name
)
"""Paths of the methods of the service."""

_WATCH_SECONDS = 0.05
"""Time between two messages of ``Watch``."""


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """Implementation of ``mlxrunner.v1.PoolService``.

    Args:
        pool: The open pool.
        settings: The settings of the pool.
        names: Decides which model a request means.
        completions: The completions in progress.
    """

    def __init__(
        self,
        pool: AsyncRunnerPool,
        settings: PoolSettings,
        names: ModelNames,
        completions: Completions,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._names = names
        self._completions = completions

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Report the pool and its models."""
        return self.state()

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        """Load a model without using it."""
        name = self._names.resolve(request.model)
        model = await self._pool.load(name, evict=not request.no_eviction)
        self._completions.resume()
        return pb.LoadModelResponse(model=model_message(model))

    async def EvictModel(
        self, request: pb.EvictModelRequest, context: Context
    ) -> pb.EvictModelResponse:
        """Stop the runner of a model that is not in use."""
        name = self._names.resolve(request.model)
        returned = await evict_known(self._pool, self._settings, name)
        self._completions.resume()
        return pb.EvictModelResponse(
            held_bytes=returned.held_bytes, returned_bytes=returned.returned_bytes
        )

    async def PinModel(self, request: pb.PinModelRequest, context: Context) -> pb.PinModelResponse:
        """Pin a model, or end that."""
        name = self._names.resolve(request.model)
        await self._pool.know(name)
        (self._pool.pin if request.pinned else self._pool.unpin)(name)
        return pb.PinModelResponse(model=model_message(await self._pool.know(name)))

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        """Report the pool now and after each change."""
        sent = None
        async with aclosing(self._pool.watch()) as states:
            async for _ in states:
                state = self.state()
                seen = without_times(state)
                if seen != sent:
                    sent = seen
                    yield pb.WatchResponse(pool=state)
                    await asyncio.sleep(_WATCH_SECONDS)
        raise RunnerUnavailableError("the pool is stopping")

    def state(self) -> pb.ListModelsResponse:
        """Return the state of the pool."""
        return pool_message(self._pool.status(), self._settings)


async def evict_known(pool: AsyncRunnerPool, settings: PoolSettings, name: str) -> MemoryReturn:
    """Stop the runner of a model that is not in use, configured or requested before.

    Raises:
        ModelNotLoadedError: The pool does not know the model.
        BusyError: The model is in use or being loaded.
    """
    try:
        return await pool.evict(name)
    except ModelNotLoadedError:
        if name in settings.models:
            return NOTHING
        raise
