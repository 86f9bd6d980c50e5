"""The gateway's service: one method per rpc, all on the engine that ``RunnerService`` uses."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from runner_server.api.contracts.smg.convert import chunk_message, complete_message
from runner_server.api.contracts.smg.model_files import special_tokens, tokenizer_archive
from runner_server.api.contracts.smg.names import Names
from runner_server.api.contracts.smg.validation import (
    Message,
    check_abort,
    check_generate,
    generate_spec,
)
from runner_server.api.prompts import encode_prompt
from runner_server.engine.backend import ModelHandle
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.types import OutputDelta
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK_BYTES = 64 * 1024
"""Of the tokenizer's archive in one message."""


class SmgServicer(mlx_engine_pb2_grpc.MlxEngineServicer):  # type: ignore[misc] # has no types
    """Answers ``mlx.grpc.engine.MlxEngine`` from one engine.

    Args:
        engine: The started engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started = time.monotonic()
        self._names = Names()

    async def Generate(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Completes a prompt; with or without ``stream`` the last message is the complete one."""
        record = current_call()
        record.request_id = request.request_id
        model = self._engine.model()
        record.model = model.info.name
        sampling = check_generate(request, model.info)
        prompt_ids = await _prompt_ids(request, model)
        spec = generate_spec(request, sampling, model.info, prompt_ids)
        completion = self._engine.submit(model, spec)
        record.stats = completion.stats
        try:
            # As for ``GenerationRequest``: also if it is queued.
            await context.send_initial_metadata(())
            with self._names.held(request.request_id, completion.stream.close):
                async for message in _messages(completion, is_stream=request.stream):
                    yield message
        finally:
            # A client that goes away, or whose deadline passes, ends up here too.
            self._engine.cancel(completion)

    async def Abort(self, request: Message, context: _Context) -> Message:
        """Ends requests by their names, as far as these are theirs alone."""
        check_abort(request)
        for name in request.request_ids:
            self._names.abort(name)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: _Context) -> Message:
        """Tells that a model is loaded; fails as ``Generate`` would where none is.

        A gateway takes any answer for a worker that is ready, asks it for its model, and does
        not ask again; one that fails it tries again later.
        """
        model = self._engine.model()
        return pb.HealthCheckResponse(healthy=True, message=f"serving {model.info.name}")

    async def GetModelInfo(self, request: Message, context: _Context) -> Message:
        """Describes the loaded model; an id of 0 may mean that it has no such token."""
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
        """Tells how much it has to do."""
        snapshot = self._engine.state()
        return pb.GetServerInfoResponse(
            server_type="mlx-grpc-runner",
            active_requests=snapshot.running_count + snapshot.queued_count,
            uptime_seconds=time.monotonic() - self._started,
        )

    async def GetTokenizer(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Streams the tokenizer's files, with the archive's SHA-256 beside the last part."""
        path = Path(self._engine.model().info.path)
        data = await asyncio.to_thread(tokenizer_archive, path)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        for part in _parts(data, digest):
            yield part


def add_smg(server: grpc.aio.Server, engine: Engine) -> None:
    """Has a server that is not started yet speak the gateway's protocol."""
    mlx_engine_pb2_grpc.add_MlxEngineServicer_to_server(SmgServicer(engine), server)


def _parts(data: bytes, digest: str) -> Iterator[Message]:
    for at in range(0, len(data), _CHUNK_BYTES):
        part = data[at : at + _CHUNK_BYTES]
        is_last = at + _CHUNK_BYTES >= len(data)
        yield common_pb2.GetTokenizerChunk(data=part, sha256=digest if is_last else "")


async def _prompt_ids(request: Message, model: ModelHandle) -> Sequence[int]:
    if request.WhichOneof("input") == "tokenized":
        ids: Sequence[int] = request.tokenized.input_ids
        return ids
    return await encode_prompt(request.text, model)


async def _messages(completion: GenerationRequest, *, is_stream: bool) -> AsyncIterator[Message]:
    """Chunks of new tokens if they are wanted, then the end with what no chunk had."""
    count = 0
    last: OutputDelta | None = None
    held: list[OutputDelta] = []
    async for piece in completion.stream.deltas():
        if is_stream and piece.token_ids:
            yield chunk_message(piece, count, completion.stats())
        count += len(piece.token_ids)
        last = piece
        if not is_stream:
            held.append(piece)
    yield complete_message(last, held, count, completion.stats())
