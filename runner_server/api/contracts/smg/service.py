"""``MlxEngine``, the gateway's service, on the same engine as ``RunnerService``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc

from runner_server.api.contracts.model_files import special_tokens
from runner_server.api.contracts.names import Names, check_abort
from runner_server.api.contracts.smg.convert import chunk_message, complete_message
from runner_server.api.contracts.smg.validation import Message, generate_draft
from runner_server.api.contracts.tokenizer_chunks import tokenizer_chunks
from runner_server.api.generation import generate, model_for_call
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.types import OutputDelta

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]


class SmgServicer(mlx_engine_pb2_grpc.MlxEngineServicer):  # type: ignore[misc] # has no types
    """Implementation of ``mlx.grpc.engine.MlxEngine`` on one engine.

    Args:
        engine: The started engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started = time.monotonic()
        self._names = Names()

    async def Generate(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Complete a prompt. The last message is a ``GenerateComplete``, streamed or not."""
        model = model_for_call(self._engine, request.request_id)
        draft = generate_draft(request, model.info)
        async with generate(self._engine, model, draft, context) as generation:
            with self._names.held(draft.request_id, generation.stream.close):
                async for message in _messages(generation, is_stream=request.stream):
                    yield message

    async def Abort(self, request: Message, context: _Context) -> Message:
        """Cancel requests by name, except for names shared with other requests."""
        check_abort(request.request_ids)
        for name in request.request_ids:
            self._names.abort(name)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: _Context) -> Message:
        """Report a loaded model as healthy; fail like ``Generate`` if none is loaded.

        The gateway treats any answer as that of a ready worker, and asks such a worker for its
        model only once. It retries a worker whose health check fails.
        """
        model = self._engine.model()
        return pb.HealthCheckResponse(healthy=True, message=f"serving {model.info.name}")

    async def GetModelInfo(self, request: Message, context: _Context) -> Message:
        """Describe the loaded model. The id of a special token is 0 if the model has none."""
        info = self._engine.model().info
        special = await asyncio.to_thread(special_tokens, Path(info.path))
        return pb.GetModelInfoResponse(
            model_path=info.path,
            is_generation=True,
            max_context_length=info.context_length,
            vocab_size=info.vocab_size,
            served_model_name=info.name,
            model_type=info.architecture,
            architectures=special.architectures,
            eos_token_ids=sorted(info.eos_token_ids),
            pad_token_id=special.pad_token_id,
            bos_token_id=special.bos_token_id,
            max_req_input_len=info.context_length - 1,
        )

    async def GetServerInfo(self, request: Message, context: _Context) -> Message:
        """Report the load of the server."""
        snapshot = self._engine.state()
        return pb.GetServerInfoResponse(
            server_type="mlx-grpc-runner",
            active_requests=snapshot.running_count + snapshot.queued_count,
            uptime_seconds=time.monotonic() - self._started,
        )

    async def GetTokenizer(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Stream an archive of the tokenizer files. The last chunk has its SHA-256."""
        async for chunk in tokenizer_chunks(Path(self._engine.model().info.path)):
            yield chunk


def add_smg(server: grpc.aio.Server, engine: Engine) -> None:
    """Add the gateway's service to a server not started yet."""
    mlx_engine_pb2_grpc.add_MlxEngineServicer_to_server(SmgServicer(engine), server)


async def _messages(completion: GenerationRequest, *, is_stream: bool) -> AsyncIterator[Message]:
    """Yield chunks of new tokens if streaming, and the complete message at the end."""
    count = 0
    last: OutputDelta | None = None
    held: list[OutputDelta] = []
    async for delta in completion.stream.deltas():
        if is_stream and delta.token_ids:
            yield chunk_message(delta, count, completion.stats())
        count += len(delta.token_ids)
        last = delta
        if not is_stream:
            held.append(delta)
    yield complete_message(last, held, count, completion.stats())
