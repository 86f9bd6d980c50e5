"""This project's runner over gRPC."""

from __future__ import annotations

import sys
import time
from typing import ClassVar

import grpc
from grpc_health.v1 import health_pb2

from bench.contenders._environment import environment
from bench.contenders._grpc import in_words, open_channel
from bench.contenders._sse import complete, options_of
from bench.contenders.base import Probe, Server, free_port
from bench.models import DEMO, DEMO_RANDOM, ensure_model
from bench.records import TEMPERATURE, TOP_K, TOP_P, ContenderError, Record, Request
from mlxrunner.v1 import runner_pb2, runner_pb2_grpc
from runner_common.contract import MAX_DRAFT
from runner_common.handshake import ReadyLine


class Ours(Server):
    """``python -m runner_server``, called with the generated stubs.

    Drafts are off, because the texts of models with random weights repeat themselves.
    """

    name = "ours"
    draft_tokens: ClassVar[int] = 0
    draft_model: ClassVar[str] = ""
    http_port: int = 0
    _channel: grpc.aio.Channel | None = None

    async def start(self) -> None:
        """Start the server and wait until the model is loaded."""
        command = [sys.executable, "-m", "runner_server"]
        command += ["--model", str(self.setup.model), "--parallel", str(self.setup.parallel)]
        command += ["--context-length", str(self.setup.context_length)]
        command += ["--log-level", "WARNING", "--draft-tokens", str(self.draft_tokens)]
        if self.http_port:
            command += ["--http", f"127.0.0.1:{self.http_port}"]
        if self.draft_model:
            command += ["--draft-model", str(ensure_model(self.draft_model))]
        await self._spawn(command, environment(self.setup.blas), pipes=True)
        self.port = ReadyLine.parse((await self._line()).decode()).port or 0
        self._channel = open_channel(self.port)
        self._stub = runner_pb2_grpc.RunnerServiceStub(self._channel)
        self._health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        await self._until(self._is_loaded, "loaded model")

    async def stop(self) -> None:
        """Close the channel and stop the process."""
        if self._channel:
            await self._channel.close()
        await super().stop()

    async def stream(self, request: Request, record: Record) -> None:
        """Stream one completion."""
        try:
            async for message in self._stub.Completion(_message(request)):
                if message.token_ids:
                    record.chunks.append((time.monotonic(), len(message.token_ids)))
                    record.token_ids.extend(message.token_ids)
                    record.completion_tokens += len(message.token_ids)
                if message.done:
                    record.prompt_tokens = message.prompt_eval_count
        except grpc.aio.AioRpcError as error:
            raise ContenderError(in_words(error)) from error

    def probes(self) -> dict[str, Probe]:
        """Return the ``Status`` RPC and the standard health check."""
        return {"Status": self._status, "health": self._check}

    async def _is_loaded(self) -> bool:
        status = await self._stub.Status(runner_pb2.StatusRequest())
        return status.state == runner_pb2.STATE_ACTIVE

    async def _status(self) -> None:
        await self._stub.Status(runner_pb2.StatusRequest())

    async def _check(self) -> None:
        await self._health(health_pb2.HealthCheckRequest())


class OverHttp(Ours):
    """The runner called through OpenAI's HTTP interface."""

    name = "ours over HTTP"

    async def start(self) -> None:
        """Start the server with a port for HTTP."""
        self.http_port = free_port()
        await super().start()

    async def stream(self, request: Request, record: Record) -> None:
        """Stream one completion."""
        body = {"prompt": list(request.prompt.token_ids), **options_of(request)}
        body |= {"ignore_eos": True, "seed": request.seed}
        await complete(self.http_port, body, record)


class Drafting(Ours):
    """The runner as installed, which drafts the tokens of a text that repeats itself."""

    name = "ours with drafts"
    draft_tokens = MAX_DRAFT


class RightDraftModel(Drafting):
    """The runner with a draft model whose guesses are right."""

    name = "ours with a draft model"
    draft_model = DEMO


class WrongDraftModel(Drafting):
    """The runner with a draft model whose guesses are wrong."""

    name = "ours with a wrong draft model"
    draft_model = DEMO_RANDOM


def _message(request: Request) -> runner_pb2.CompletionRequest:
    options = runner_pb2.CompletionOptions(
        temperature=0, num_predict=request.max_tokens, ignore_eos=not request.json_schema
    )
    if request.sampled:
        options.temperature = TEMPERATURE
        options.top_p = TOP_P
        options.top_k = TOP_K
        options.seed = request.seed
    message = runner_pb2.CompletionRequest(
        prompt_token_ids=runner_pb2.TokenIds(ids=request.prompt.token_ids), options=options
    )
    if request.json_schema:
        message.constraint.json_schema = request.json_schema
    return message
