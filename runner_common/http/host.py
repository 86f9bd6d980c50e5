"""Interface between HTTP and a runner or pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from google.rpc import status_pb2

    from mlxrunner.v1 import pool_pb2
    from mlxrunner.v1 import runner_pb2 as pb
    from runner_common.http.call import HttpCall


class StatusError(Exception):
    """A call failed with a status of the error table.

    Args:
        status: The status, with the details that gRPC callers get.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model by the name for requests.

    Attributes:
        name: The name that requests use.
        path: The directory of its files; empty if it is not known yet.
        loaded: The loaded model as ``Status`` describes it; None if it is not loaded, and for the
            models of a pool, which :meth:`Host.status` describes.
        pooled: The state of a pool's model; None for a runner's.
    """

    name: str
    path: str = ""
    loaded: pb.Model | None = None
    pooled: pool_pb2.PoolModel | None = None


class Keeper(Protocol):
    """Control over the models in a pool's memory.

    Methods raise :class:`StatusError` and no other exception.
    """

    async def load(self, model: str, call: HttpCall) -> pb.StatusResponse:
        """Load a model if necessary, and report its state while it is certainly loaded."""
        ...

    async def unload(self, model: str) -> None:
        """Stop a model's runner now, or at the end of the last request."""
        ...

    def keep(self, model: str, seconds: float) -> None:
        """Choose the keep-alive of a model until the next unload.

        Args:
            model: A model that is loaded.
            seconds: The time; ``inf`` pins the model.
        """
        ...

    def kept_seconds(self, model: str) -> float:
        """Return the time for which an unused model stays; ``inf`` without a limit."""
        ...

    async def find(self, model: str) -> HostedModel:
        """Find a model, configured or not."""
        ...


class Host(Protocol):
    """A runner or a pool behind the HTTP interfaces.

    Methods with a ``call`` count as calls for the request log, metrics and spans, like those of
    gRPC. They raise :class:`StatusError` and no other exception. Cancelling the task that runs
    them ends the request at once. The ``model`` of a request is a name of :meth:`models`, or empty
    for the only one.

    Attributes:
        keeper: Loads and unloads models; None for a runner, whose model stays.
    """

    @property
    def keeper(self) -> Keeper | None:
        """Control over the models in memory."""
        ...

    def chat(
        self, request: pb.ChatRequest, call: HttpCall
    ) -> AsyncGenerator[pb.ChatResponse, None]:
        """Stream the answer to a conversation; see ``RunnerService.Chat``.

        Awaits ``call.send_initial_metadata`` once the request is accepted.
        """
        ...

    def completion(
        self, request: pb.CompletionRequest, call: HttpCall
    ) -> AsyncGenerator[pb.CompletionResponse, None]:
        """Stream a completion; see ``RunnerService.Completion`` and :meth:`chat`."""
        ...

    async def embed(self, request: pb.EmbedRequest, call: HttpCall) -> pb.EmbedResponse:
        """Return the vectors of texts; see ``RunnerService.Embed``."""
        ...

    async def status(self, model: str, call: HttpCall) -> pb.StatusResponse:
        """Report the state of a loaded model; see ``RunnerService.Status``.

        Args:
            model: A name of :meth:`models`; empty for the only one.
            call: The call.
        """
        ...

    async def models(self, call: HttpCall) -> Sequence[HostedModel]:
        """Return the models for requests to name."""
        ...

    def problem(self) -> status_pb2.Status | None:
        """Return the reason to refuse requests now; None without one."""
        ...

    def refused(self, error: Exception, method: str, call: HttpCall) -> status_pb2.Status:
        """Return the status for a call refused by HTTP itself, and count the call.

        Args:
            error: Any exception, such as an ``UnreadableRequestError``.
            method: Name of the rpc that the call would have been.
            call: The call.
        """
        ...
