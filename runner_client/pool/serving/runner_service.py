"""``RunnerService`` for all models of a pool."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.checks import check_seconds
from runner_client.errors import InvalidRequestError
from runner_client.memory.estimation import estimate
from runner_client.pool.serving.messages import (
    duration,
    estimate_message,
    load_options,
    require_configured,
)
from runner_client.pool.serving.pool_service import evict_known
from runner_common.contract import (
    MAX_ABORTED_IDS,
    MAX_DRAIN_SECONDS,
    MAX_REQUEST_ID_CHARS,
    SERVICE_NAME,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from runner_client.memory.gate import GateDecision, MemoryGate
    from runner_client.pool.aio_member import Member
    from runner_client.pool.aio_pool import AsyncRunnerPool
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.serving.completions import Completions
    from runner_client.pool.serving.forward import Context, Forwarder
    from runner_client.pool.serving.metrics import PoolMetrics
    from runner_client.pool.serving.names import ModelNames

    _Named = (
        pb.ChatRequest
        | pb.CompletionRequest
        | pb.EmbedRequest
        | pb.TokenizeRequest
        | pb.DetokenizeRequest
        | pb.RenderChatRequest
        | pb.StatusRequest
        | pb.WatchStatusRequest
        | pb.TrimRequest
    )

logger = logging.getLogger(__name__)

METHODS = frozenset(
    f"/{SERVICE_NAME}/{name}"
    for name in pb.DESCRIPTOR.services_by_name["RunnerService"].methods_by_name
)
"""Paths of the methods of the service."""


class PooledRunnerService:
    """Implementation of ``mlxrunner.v1.RunnerService`` on a pool.

    Responses of runners are not parsed: handlers of forwarded methods return bytes.

    Args:
        pool: The open pool.
        settings: The settings of the pool.
        names: Decides which model a request means.
        gate: Measures memory for estimates.
        environ: The runners' environment.
        blas: The runners' BLAS library, as for ``RunnerProcess``.
        forwarder: Passes calls on to runners.
        completions: The completions in progress.
    """

    def __init__(
        self,
        pool: AsyncRunnerPool,
        settings: PoolSettings,
        names: ModelNames,
        gate: MemoryGate,
        environ: Mapping[str, str],
        blas: str,
        forwarder: Forwarder,
        completions: Completions,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._names = names
        self._gate = gate
        self._environ = environ
        self._blas = blas
        self._forwarder = forwarder
        self._completions = completions
        self.metrics: PoolMetrics | None = None
        """Counts the waits for models, if set."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the service to a server that has not started yet."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Completion": stream(self.completion, pb.CompletionRequest.FromString),
            "Chat": stream(self.chat, pb.ChatRequest.FromString),
            "WatchStatus": stream(self.watch_status, pb.WatchStatusRequest.FromString),
            "Embed": unary(self.embed, pb.EmbedRequest.FromString),
            "Tokenize": unary(self.tokenize, pb.TokenizeRequest.FromString),
            "Detokenize": unary(self.detokenize, pb.DetokenizeRequest.FromString),
            "RenderChat": unary(self.render_chat, pb.RenderChatRequest.FromString),
            "Status": unary(self.status, pb.StatusRequest.FromString),
            "Trim": unary(self.trim, pb.TrimRequest.FromString),
            "Load": _own(self.load, pb.LoadRequest),
            "Unload": _own(self.unload, pb.UnloadRequest),
            "Estimate": _own(self.estimate, pb.EstimateRequest),
            "Abort": _own(self.abort, pb.AbortRequest),
            "Drain": _own(self.drain, pb.DrainRequest),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    def completion(self, request: pb.CompletionRequest, context: Context) -> AsyncGenerator[bytes]:
        """Lease the model, and stream the completion of its runner."""
        return self._generate("Completion", request, context)

    def chat(self, request: pb.ChatRequest, context: Context) -> AsyncGenerator[bytes]:
        """Lease the model, and stream the answer of its runner."""
        return self._generate("Chat", request, context)

    async def _generate(
        self, method: str, request: pb.CompletionRequest | pb.ChatRequest, context: Context
    ) -> AsyncGenerator[bytes]:
        with self._completions.begin(request.request_id) as completion:
            async with self._lease(request) as member:
                data = _unnamed(request)
                messages = self._forwarder.stream(
                    member, method, data, context, completion.forwarded
                )
                async with aclosing(messages):
                    async for message in messages:
                        yield message

    async def embed(self, request: pb.EmbedRequest, context: Context) -> bytes:
        """Lease the model, and pass the call on, which ends like a completion."""
        with self._completions.begin(request.request_id) as completion:
            async with self._lease(request) as member:
                # The wait for the model is over, as headers tell callers.
                await context.send_initial_metadata(())
                data = _unnamed(request)
                return await self._forwarder.unary(
                    member, "Embed", data, context, completion.forwarded
                )

    async def tokenize(self, request: pb.TokenizeRequest, context: Context) -> bytes:
        """Lease the model, and pass the call on."""
        async with self._lease(request) as member:
            return await self._forwarder.unary(member, "Tokenize", _unnamed(request), context)

    async def detokenize(self, request: pb.DetokenizeRequest, context: Context) -> bytes:
        """Lease the model, and pass the call on."""
        async with self._lease(request) as member:
            return await self._forwarder.unary(member, "Detokenize", _unnamed(request), context)

    async def render_chat(self, request: pb.RenderChatRequest, context: Context) -> bytes:
        """Lease the model, and pass the call on."""
        async with self._lease(request) as member:
            return await self._forwarder.unary(member, "RenderChat", _unnamed(request), context)

    async def status(self, request: pb.StatusRequest, context: Context) -> bytes:
        """Pass the call on, if the model is loaded."""
        member = self._loaded(request)
        return await self._forwarder.unary(member, "Status", _unnamed(request), context)

    async def trim(self, request: pb.TrimRequest, context: Context) -> bytes:
        """Pass the call on, if the model is loaded."""
        member = self._loaded(request)
        return await self._forwarder.unary(member, "Trim", _unnamed(request), context)

    async def watch_status(
        self, request: pb.WatchStatusRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """Pass the call on, if the model is loaded. Does not keep the model loaded."""
        member = self._loaded(request)
        messages = self._forwarder.stream(member, "WatchStatus", _unnamed(request), context)
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def load(self, request: pb.LoadRequest, context: Context) -> pb.LoadResponse:
        """Load the model with its configured options."""
        began = time.monotonic()
        name = self._names.resolve(request.model)
        require_configured(request, self._settings.of(name).options)
        async with self._pool.lease(name) as member:
            data = await self._forwarder.unary(member, "Status", b"", context)
        self._completions.resume()
        return pb.LoadResponse(
            model=pb.StatusResponse.FromString(data).model,
            load_duration=duration(time.monotonic() - began),
        )

    async def unload(self, request: pb.UnloadRequest, _context: Context) -> pb.UnloadResponse:
        """Evict the model."""
        returned = await evict_known(self._pool, self._settings, self._names.resolve(request.model))
        self._completions.resume()
        return pb.UnloadResponse(freed_bytes=max(0, returned.returned_bytes))

    async def loaded_status(self, model: str, context: Context) -> bytes:
        """Lease the model, and return the ``StatusResponse`` of its runner."""
        async with self._lease(pb.StatusRequest(model=model)) as member:
            return await self._forwarder.unary(member, "Status", b"", context)

    async def estimate(self, request: pb.EstimateRequest, _context: Context) -> pb.EstimateResponse:
        """Estimate a load by the files, and compare it with the memory that is free now."""
        name = self._names.resolve(request.model)
        return await asyncio.to_thread(self._estimate, name, request)

    def _estimate(self, name: str, request: pb.EstimateRequest) -> pb.EstimateResponse:
        options = load_options(request)
        found = estimate(name, options=options, env=self._environ, blas=self._blas)
        decision: GateDecision = self._gate.available(self._environ)
        answer = estimate_message(found, decision)
        if options.dtype != "auto_or_stored" or answer.fits or found.dtype == "as_stored":
            return answer
        stored = estimate(
            name, options=options, dtype="as_stored", env=self._environ, blas=self._blas
        )
        answer = estimate_message(stored, decision)
        answer.notes.append(
            f"there is too little memory for {found.dtype}: it would be held as stored"
        )
        return answer

    async def abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End completions of all models by their ids."""
        _check_ids(request.request_ids)
        waiting = self._completions.abort_waiting(frozenset(request.request_ids))
        data = request.SerializeToString()
        counts = [self._abort_on(member, data, context) for member in self._members()]
        return pb.AbortResponse(aborted_count=waiting + sum(await asyncio.gather(*counts)))

    async def _abort_on(self, member: Member, data: bytes, context: Context) -> int:
        try:
            answer = await self._forwarder.call(member, "Abort", data, context)
        except grpc.aio.AioRpcError as error:
            # A runner that stops or is gone ends its completions by itself.
            logger.info("an Abort did not reach a runner: %s", error.details())
            return 0
        return pb.AbortResponse.FromString(answer).aborted_count

    async def drain(self, request: pb.DrainRequest, _context: Context) -> pb.DrainResponse:
        """Refuse new completions, and wait for those in progress."""
        seconds = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else None
        check_seconds("timeout", seconds, 0, MAX_DRAIN_SECONDS)
        finished, aborted = await self._completions.drain(seconds)
        return pb.DrainResponse(finished_count=finished, aborted_count=aborted)

    @asynccontextmanager
    async def _lease(self, request: _Named) -> AsyncIterator[Member]:
        name, began = self._names.resolve(request.model), time.monotonic()
        outcome = "refused"
        try:
            async with self._pool.lease(name) as member:
                self._note_wait(name, outcome := "granted", began)
                yield member
        except asyncio.CancelledError:
            if outcome == "refused":
                outcome = "cancelled"
            raise
        finally:
            if outcome != "granted":
                self._note_wait(name, outcome, began)

    def _note_wait(self, name: str, outcome: str, began: float) -> None:
        if self.metrics is not None:
            self.metrics.observe(name, outcome, time.monotonic() - began)

    def _loaded(self, request: _Named) -> Member:
        return self._pool.member(self._names.resolve(request.model))

    def _members(self) -> list[Member]:
        """Return the runners of all loaded models."""
        return [
            self._pool.member(model.name)
            for model in self._pool.models()
            if model.address is not None
        ]


def _own(behaviour: Any, request: type[Any]) -> grpc.RpcMethodHandler[Any, Any]:  # noqa: ANN401 - of any rpc
    """Return the handler of a method that the pool itself answers."""
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request.FromString, lambda answer: answer.SerializeToString()
    )


def _unnamed(request: _Named) -> bytes:
    """Return a request's bytes without the name of the model: a runner has one model."""
    request.ClearField("model")
    return request.SerializeToString()


def _check_ids(ids: Any) -> None:  # noqa: ANN401 - a repeated field
    """Refuse what a runner refuses, also if none is loaded.

    Raises:
        InvalidRequestError: There are too few or too many ids, or one is empty or too long.
    """
    wrong = []
    if not 1 <= len(ids) <= MAX_ABORTED_IDS:
        wrong.append(("request_ids", f"{len(ids)} ids; 1 to {MAX_ABORTED_IDS}"))
    for i, name in enumerate(ids[:MAX_ABORTED_IDS]):
        if not 1 <= len(name) <= MAX_REQUEST_ID_CHARS:
            problem = f"{len(name)} characters; 1 to {MAX_REQUEST_ID_CHARS}"
            wrong.append((f"request_ids[{i}]", problem))
    if wrong:
        text = "; ".join(f"{name}: {problem}" for name, problem in wrong)
        raise InvalidRequestError(text, field_violations=wrong)
