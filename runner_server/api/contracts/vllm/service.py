"""``VllmEngine``, the contract of vLLM's workers, on the same engine as ``RunnerService``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from runner_server.api.contracts.model_files import special_tokens
from runner_server.api.contracts.names import Names, check_abort
from runner_server.api.contracts.tokenizer_chunks import tokenizer_chunks
from runner_server.api.contracts.vllm.convert import load_message
from runner_server.api.contracts.vllm.samples import messages, samples
from runner_server.api.contracts.vllm.validation import Message, embed_request, generate_call
from runner_server.api.embedding import embed_spec, embedding
from runner_server.api.generation import model_for_call
from runner_server.engine.engine import Engine
from runner_server.errors import InvalidField

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]

_NO_EVENTS = (
    "SubscribeKvEvents: this server publishes no events of its prefix cache; the gateway's "
    "cache_aware policy then routes by the prompts that it has seen"
)
_NO_FLUSH = "FlushCache: use Trim of mlxrunner.v1.RunnerService, with prefix_cache_bytes 0"
_NO_PROFILE = "this server has no profiler; see its metrics and spans"


class VllmServicer(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc] # has no types
    """Implementation of ``vllm.grpc.engine.VllmEngine`` on one engine.

    Args:
        engine: The started engine.
        version: Version of the server, for ``GetLoads``.
    """

    def __init__(self, engine: Engine, version: str) -> None:
        self._engine = engine
        self._version = version
        self._started = time.monotonic()
        self._names = Names()

    async def Generate(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Complete a prompt ``n`` times. Each answer ends with a ``GenerateComplete``."""
        model = model_for_call(self._engine, request.request_id)
        with _own_field_names():
            call = generate_call(request, model.info)
            async with samples(self._engine, model, call, context) as running:

                def end() -> None:
                    for each in running:
                        each.stream.close()

                with self._names.held(request.request_id, end):
                    async for message in messages(running, is_stream=call.is_stream):
                        yield message

    async def Embed(self, request: Message, context: _Context) -> Message:
        """Return the vector of a text."""
        model = model_for_call(self._engine, request.request_id)
        with _own_field_names():
            spec = await embed_spec(embed_request(request), model)
        async with embedding(self._engine, model, spec, context) as running:
            found = await running.stream.result()
        (vector,) = found.vectors
        return pb.EmbedResponse(
            embedding=vector, prompt_tokens=len(spec.texts[0]), embedding_dim=len(vector)
        )

    async def Abort(self, request: Message, context: _Context) -> Message:
        """Cancel requests by name, except for names shared with other requests."""
        check_abort(request.request_ids)
        for name in request.request_ids:
            self._names.abort(name)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: _Context) -> Message:
        """Report a loaded model as healthy; fail like ``Generate`` if none is loaded."""
        model = self._engine.model()
        return pb.HealthCheckResponse(healthy=True, message=f"serving {model.info.name}")

    async def GetModelInfo(self, request: Message, context: _Context) -> Message:
        """Describe the loaded model. The id of a special token is 0 if the model has none."""
        info = self._engine.model().info
        special = await asyncio.to_thread(special_tokens, Path(info.path))
        return pb.GetModelInfoResponse(
            model_path=info.path,
            tokenizer_path=info.path,
            is_generation=info.completes,
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
        """Report the requests of the server, and its limits."""
        state = self._engine.state()
        return pb.GetServerInfoResponse(
            server_type="mlx-grpc-runner",
            active_requests=state.running_count + state.queued_count,
            uptime_seconds=time.monotonic() - self._started,
            data_parallel_size=1,
            model_dtype=state.model.dtype if state.model else "",
            max_num_seqs=state.model.parallel if state.model else 0,
            # Constraints do not wait for the end of a model's reasoning.
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: Message, context: _Context) -> Message:
        """Report the load of the only rank; none for another one."""
        loads = [] if request.dp_rank else [load_message(self._engine.state())]
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=self._version,
            dp_rank_count=1,
            loads=loads,
        )

    async def GetTokenizer(self, request: Message, context: _Context) -> AsyncIterator[Message]:
        """Stream an archive of the tokenizer files. The last chunk has its SHA-256."""
        async for chunk in tokenizer_chunks(Path(self._engine.model().info.path)):
            yield chunk

    async def SubscribeKvEvents(
        self, request: Message, context: _Context
    ) -> AsyncIterator[Message]:
        """Refuse: the server publishes no events."""
        await _refuse(context, _NO_EVENTS)
        yield

    async def FlushCache(self, request: Message, context: _Context) -> Message:
        """Refuse: ``Trim`` of the runner's own protocol, for its administrator, does this."""
        await _refuse(context, _NO_FLUSH)

    async def StartProfile(self, request: Message, context: _Context) -> Message:
        """Refuse: the server has no profiler."""
        await _refuse(context, f"StartProfile: {_NO_PROFILE}")

    async def StopProfile(self, request: Message, context: _Context) -> Message:
        """Refuse: the server has no profiler."""
        await _refuse(context, f"StopProfile: {_NO_PROFILE}")


def add_vllm(server: grpc.aio.Server, engine: Engine, version: str) -> None:
    """Add the contract to a server not started yet."""
    servicer = VllmServicer(engine, version)
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)


async def _refuse(context: _Context, text: str) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)


_FIELDS = {
    "constraint.lark": "sampling_params.grammar",
    "constraint.choice.texts": "sampling_params.choice.choices",
    "constraint": "sampling_params.constraint",
    "inputs[0].token_ids.ids": "tokenized.input_ids",
}
"""Fields of the runner's own protocol, and their names in this contract."""


@contextmanager
def _own_field_names() -> Iterator[None]:
    """Name the fields of this contract in errors of code that all contracts share."""
    try:
        yield
    except InvalidField as error:
        raise InvalidField([(_own(field), text) for field, text in error.violations]) from error


def _own(field: str) -> str:
    for theirs, own in _FIELDS.items():
        if field == theirs or field.startswith(f"{theirs}["):
            return own + field.removeprefix(theirs)
    return field.replace("constraint.", "sampling_params.", 1)
