"""The pool as the host of the HTTP interfaces."""

from __future__ import annotations

from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.errors import BusyError
from runner_client.pool.serving.messages import model_message
from runner_client.pool.serving.pool_service import evict_known
from runner_client.pool.serving.translate import translate
from runner_common.http.host import HostedModel, StatusError
from runner_common.serving.statuses import error_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from google.rpc import status_pb2

    from mlxrunner.v1 import pool_pb2
    from runner_client.pool.aio_pool import AsyncRunnerPool
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.serving.names import ModelNames
    from runner_client.pool.serving.runner_service import PooledRunnerService
    from runner_common.http.call import HttpCall
    from runner_common.http.host import Keeper


class PoolHost:
    """Implementation of ``Host`` on a pool.

    Args:
        service: The service.
        state: Returns the state of the pool.
        keeper: Loads and unloads models.
    """

    def __init__(
        self,
        service: PooledRunnerService,
        state: Callable[[], pool_pb2.ListModelsResponse],
        keeper: Keeper,
    ) -> None:
        self._service = service
        self._state = state
        self.keeper: Keeper | None = keeper
        self.is_stopping = False

    async def chat(
        self, request: pb.ChatRequest, call: HttpCall
    ) -> AsyncGenerator[pb.ChatResponse, None]:
        """Stream the answer of the model's runner."""
        with _translated():
            async with aclosing(self._service.chat(request, call)) as messages:
                async for message in messages:
                    yield pb.ChatResponse.FromString(message)

    async def completion(
        self, request: pb.CompletionRequest, call: HttpCall
    ) -> AsyncGenerator[pb.CompletionResponse, None]:
        """Stream the completion of the model's runner."""
        with _translated():
            async with aclosing(self._service.completion(request, call)) as messages:
                async for message in messages:
                    yield pb.CompletionResponse.FromString(message)

    async def embed(self, request: pb.EmbedRequest, call: HttpCall) -> pb.EmbedResponse:
        """Return the vectors of the model's runner."""
        with _translated():
            return pb.EmbedResponse.FromString(await self._service.embed(request, call))

    async def status(self, model: str, call: HttpCall) -> pb.StatusResponse:
        """Report the state of the model's runner."""
        with _translated():
            found = await self._service.status(pb.StatusRequest(model=model), call)
            return pb.StatusResponse.FromString(found)

    async def models(self, _call: HttpCall) -> Sequence[HostedModel]:
        """Return the configured models, and others named before."""
        return [HostedModel(model.name, model.path, pooled=model) for model in self._state().models]

    def problem(self) -> status_pb2.Status | None:
        """Return the reason to refuse requests now; None without one."""
        if self.is_stopping:
            return error_status("SHUTTING_DOWN", "the pool is stopping; use another")
        return None

    def refused(self, error: Exception, _method: str, _call: HttpCall) -> status_pb2.Status:
        """Return the status for a call refused by HTTP itself."""
        return translate(error)


class PoolKeeper:
    """Implementation of ``Keeper``.

    Args:
        service: The service that leases models.
        pool: The open pool.
        settings: The settings of the pool.
        names: Decides which model a request means.
    """

    def __init__(
        self,
        service: PooledRunnerService,
        pool: AsyncRunnerPool,
        settings: PoolSettings,
        names: ModelNames,
    ) -> None:
        self._service = service
        self._pool = pool
        self._settings = settings
        self._names = names

    async def load(self, model: str, call: HttpCall) -> pb.StatusResponse:
        """Load a model if necessary, and report the state of its runner."""
        with _translated():
            return pb.StatusResponse.FromString(await self._service.loaded_status(model, call))

    async def unload(self, model: str) -> None:
        """Stop a model's runner now, or at the end of the last request."""
        with _translated():
            name = self._names.resolve(model)
            try:
                await evict_known(self._pool, self._settings, name)
            except BusyError:
                self._pool.keep(name, 0.0)

    def keep(self, model: str, seconds: float) -> None:
        """Choose the keep-alive of a model."""
        with _translated():
            self._pool.keep(self._names.resolve(model), seconds)

    def kept_seconds(self, model: str) -> float:
        """Return the time for which an unused model stays."""
        with _translated():
            return self._pool.kept_seconds(model)

    async def find(self, model: str) -> HostedModel:
        """Estimate a model, configured or not."""
        with _translated():
            found = model_message(await self._pool.know(self._names.resolve(model)))
        return HostedModel(found.name, found.path, pooled=found)


@contextmanager
def _translated() -> Iterator[None]:
    """Translate the exceptions of a call."""
    try:
        yield
    except StatusError:
        raise
    except Exception as error:
        raise StatusError(translate(error)) from error
