"""The runner as the host of the HTTP interfaces, without gRPC in between."""

from __future__ import annotations

from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.host import HostedModel, StatusError
from runner_server.errors import RunnerFault
from runner_server.telemetry.call_record import CallRecord, enter
from runner_server.transport.translate import translate

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from google.rpc import status_pb2

    from runner_common.http.call import HttpCall
    from runner_common.http.host import Keeper
    from runner_server.api.service import RunnerServicer
    from runner_server.engine.engine import Engine
    from runner_server.telemetry.interceptor import Observer

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class RunnerHost:
    """Implementation of ``Host`` on the service of gRPC.

    Each generation counts as one call: a request for several choices counts as several.

    Args:
        servicer: The service.
        engine: Its engine.
        observers: The observers of calls. The sequence may grow at any time.
    """

    def __init__(
        self, servicer: RunnerServicer, engine: Engine, observers: Sequence[Observer]
    ) -> None:
        self._servicer = servicer
        self._engine = engine
        self._observers = observers
        self.keeper: Keeper | None = None

    async def chat(
        self, request: pb.ChatRequest, call: HttpCall
    ) -> AsyncGenerator[pb.ChatResponse, None]:
        """Stream the answer to a conversation."""
        with self._recorded("Chat", call):
            request.model = self._known(request.model)
            async with aclosing(self._servicer.Chat(request, _context(call))) as messages:
                async for message in messages:
                    yield message

    async def completion(
        self, request: pb.CompletionRequest, call: HttpCall
    ) -> AsyncGenerator[pb.CompletionResponse, None]:
        """Stream a completion."""
        with self._recorded("Completion", call):
            request.model = self._known(request.model)
            async with aclosing(self._servicer.Completion(request, _context(call))) as messages:
                async for message in messages:
                    yield message

    async def embed(self, request: pb.EmbedRequest, call: HttpCall) -> pb.EmbedResponse:
        """Return the vectors of texts."""
        with self._recorded("Embed", call):
            request.model = self._known(request.model)
            return await self._servicer.Embed(request, _context(call))

    async def status(self, model: str, call: HttpCall) -> pb.StatusResponse:
        """Report the state of the process."""
        with self._recorded("Status", call):
            request = pb.StatusRequest(model=self._known(model))
            return await self._servicer.Status(request, _context(call))

    async def models(self, call: HttpCall) -> Sequence[HostedModel]:
        """Return the loaded model, if there is one."""
        status = await self.status("", call)
        if not status.HasField("model"):
            return ()
        return (HostedModel(status.model.name, status.model.path, status.model),)

    def problem(self) -> status_pb2.Status | None:
        """Return the reason to refuse generations now; None without one."""
        try:
            self._engine.model()
            self._engine.refuse_when_draining()
        except RunnerFault as fault:
            return translate(fault)
        return None

    def refused(self, error: Exception, method: str, call: HttpCall) -> status_pb2.Status:
        """Return the status for a call refused by HTTP itself, and count the call."""
        try:
            with self._recorded(method, call):
                raise error
        except StatusError as failed:
            return failed.status

    def _known(self, name: str) -> str:
        """Return a name that the engine knows, for the short one that `/v1/models` lists."""
        model = self._engine.state().model
        return model.path if model and name == model.name else name

    @contextmanager
    def _recorded(self, method: str, call: HttpCall) -> Iterator[None]:
        """Report a call to the observers, and translate its exceptions."""
        record = CallRecord.arrived(method, call.headers, call.path)
        enter(record)
        handlers = [observer.observe(record) for observer in self._observers]
        code = grpc.StatusCode.CANCELLED.name
        try:
            yield
            code = grpc.StatusCode.OK.name
        except Exception as error:
            status = translate(error)
            code = _CODES[status.code]
            raise StatusError(status) from error
        finally:
            summary = record.end(code)
            for handle in handlers:
                handle(summary)


def _context(call: HttpCall) -> grpc.aio.ServicerContext[Any, Any]:
    """Return a call as the service's methods take it, which use no more than ``CallContext``."""
    return cast("grpc.aio.ServicerContext[Any, Any]", call)
