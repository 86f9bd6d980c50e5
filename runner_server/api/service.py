"""``RunnerService``: validation of requests, generation on the engine, encoding of output."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_server.api.chat.conversation import conversation_of
from runner_server.api.chat.encoding import chat_message
from runner_server.api.chat.prompting import chat_prompt
from runner_server.api.chat.requests import chat_draft
from runner_server.api.convert import (
    STATES,
    delta_message,
    duration,
    estimate_message,
    memory_message,
    model_message,
    rank_message,
)
from runner_server.api.draining import drain
from runner_server.api.embedding import embed_message, embed_spec, embedding
from runner_server.api.estimator import Estimator
from runner_server.api.generation import generate, model_for_call
from runner_server.api.prompts import too_many
from runner_server.api.status_watch import states
from runner_server.api.validation import (
    abort_ids,
    completion_draft,
    drain_seconds,
    load_spec,
    trim_bytes,
    watch_interval,
)
from runner_server.api.violations import check_token_ids
from runner_server.chat.renderer import ChatRenderer
from runner_server.engine.backend import ModelHandle, Ranks
from runner_server.engine.commands import ModelCommand
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.output.prompt_text import PromptTexts
from runner_server.engine.output.token_text import TokenTexts
from runner_server.engine.types import EngineState, LoadSpec, ModelInfo
from runner_server.errors import InvalidField, RunnerFault
from runner_server.host.blas import blas_of
from runner_server.host.resident_memory import resident_bytes
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]

_T = TypeVar("_T")

_MAX_ANSWER_TOKENS = 1_000_000
"""Most token ids in one answer. Each takes at most three bytes, so the answer stays below gRPC's
default limit of 4 MiB."""

_MAX_ANSWER_BYTES = 4 * 2**20 - 1024
_MAX_REQUEST_TOKENS = 4 * 2**20
"""Most token ids in one request: the text of more would hardly fit into an answer."""


class RunnerServicer(runner_pb2_grpc.RunnerServiceServicer):
    """Implementation of ``mlxrunner.v1.RunnerService`` on one engine.

    Args:
        engine: The started engine.
        version: The version of the server.
        estimator: Estimates the memory of loads.
        renderer: Renders conversations.
        ranks: Other processes with parts of the model; None if this process has all of it.
    """

    def __init__(
        self,
        engine: Engine,
        version: str,
        estimator: Estimator,
        renderer: ChatRenderer,
        ranks: Ranks | None = None,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._estimator = estimator
        self._ranks = ranks
        self._version = version
        self._started = time.monotonic()
        self._runner_id = secrets.token_hex(8)

    async def Load(self, request: pb.LoadRequest, context: _Context) -> pb.LoadResponse:
        """Load a model."""
        started = time.monotonic()
        current_call().model = request.model
        spec = load_spec(request)
        await self._refuse_early(spec)
        info = await _outcome(self._engine.load(spec))
        return pb.LoadResponse(
            model=self._model(info), load_duration=duration(time.monotonic() - started)
        )

    async def _refuse_early(self, spec: LoadSpec) -> None:
        """Refuse a load that could not succeed before it costs the loaded model.

        Not if several ranks hold the model: the estimate is that of a whole model.
        """
        self._engine.refuse_when_busy()
        if self._ranks or self._engine.state().model is None:
            return
        try:
            await self._estimator.require_fit(spec)
        except RunnerFault as fault:
            self._engine.note_refused_load(spec, fault)
            raise

    def _model(self, info: ModelInfo) -> pb.Model:
        return model_message(info, 1 + len(self._ranks.others) if self._ranks else 1)

    async def Estimate(self, request: pb.EstimateRequest, context: _Context) -> pb.EstimateResponse:
        """Estimate the memory a load would need."""
        self._engine.refuse_when_ending()
        current_call().model = request.model
        spec = load_spec(request)
        return estimate_message(await self._estimator.estimate(spec))

    async def Trim(self, request: pb.TrimRequest, context: _Context) -> pb.TrimResponse:
        """Return freed memory to the system, after reducing the prefix cache."""
        kept = trim_bytes(request)
        before = self._held_bytes()
        await asyncio.wrap_future(self._engine.trim(kept, request.model))
        return pb.TrimResponse(freed_bytes=max(0, before - self._held_bytes()))

    def _held_bytes(self) -> int:
        memory = self._engine.memory()
        is_gpu = self._engine.device.startswith("gpu")
        return memory.held_bytes if is_gpu else resident_bytes()

    async def Unload(self, request: pb.UnloadRequest, context: _Context) -> pb.UnloadResponse:
        """Unload the model."""
        freed = await _outcome(self._engine.unload(request.model))
        return pb.UnloadResponse(freed_bytes=freed)

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.StatusResponse:
        """Report the state and memory of the process."""
        self._engine.require_named(request.model)
        return self._status(self._engine.state())

    async def WatchStatus(
        self,
        request: pb.WatchStatusRequest,
        context: _Context,
    ) -> AsyncIterator[pb.WatchStatusResponse]:
        """Report the state and memory of the process now and after each change."""
        self._engine.require_named(request.model)
        async with aclosing(states(self._engine, watch_interval(request))) as snapshots:
            async for snapshot in snapshots:
                yield pb.WatchStatusResponse(status=self._status(snapshot))

    def _status(self, snapshot: EngineState) -> pb.StatusResponse:
        memory = self._engine.memory()
        answer = pb.StatusResponse(
            state=STATES[snapshot.state],
            progress=snapshot.progress,
            memory=memory.held_bytes,
            memory_usage=memory_message(memory, resident_bytes(), device=self._engine.device),
            running_count=snapshot.running_count,
            queued_count=snapshot.queued_count,
            step_count=snapshot.step_count,
            uptime_duration=duration(time.monotonic() - self._started),
            runner_id=self._runner_id,
            pid=os.getpid(),
            device=self._engine.device,
            blas=blas_of(self._engine.device),
            server_version=self._version,
            last_error=snapshot.last_error,
            kv_token_count=snapshot.kv_token_count,
            kv_token_capacity=snapshot.kv_token_capacity,
            prefix_cached_ratio=snapshot.prefix_cached_ratio,
            tokens_per_second=snapshot.tokens_per_second,
        )
        if snapshot.last_progress_age is not None:
            answer.last_progress_age.CopyFrom(duration(snapshot.last_progress_age))
        if snapshot.model:
            answer.model.CopyFrom(self._model(snapshot.model))
            answer.context_length = snapshot.model.context_length
            answer.parallel = snapshot.model.parallel
            answer.memory_usage.limit_bytes = snapshot.model.limit_bytes
            answer.memory_usage.reserved_bytes = snapshot.model.reserved_bytes
        if self._ranks:
            answer.ranks.append(
                pb.Rank(
                    host=socket.gethostname(),
                    pid=answer.pid,
                    device=answer.device,
                    memory_usage=answer.memory_usage,
                )
            )
            answer.ranks.extend(map(rank_message, self._ranks.others))
        return answer

    async def Completion(
        self,
        request: pb.CompletionRequest,
        context: _Context,
    ) -> AsyncGenerator[pb.CompletionResponse]:
        """Stream a completion."""
        model = model_for_call(self._engine, request.request_id, request.model)
        draft = completion_draft(request, model.info)
        async with generate(self._engine, model, draft, context) as generation:
            texts = _token_texts(model, generation)
            prompt_texts = _prompt_texts(model, generation)
            async for delta in generation.stream.deltas():
                yield delta_message(delta, texts, prompt_texts)

    async def Embed(self, request: pb.EmbedRequest, context: _Context) -> pb.EmbedResponse:
        """Return the vectors of texts."""
        model = model_for_call(self._engine, request.request_id, request.model)
        spec = await embed_spec(request, model)
        async with embedding(self._engine, model, spec, context) as running:
            return embed_message(spec, await running.stream.result())

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:
        """End completions by their ``request_id``."""
        return pb.AbortResponse(aborted_count=self._engine.abort(abort_ids(request)))

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> pb.DrainResponse:
        """Refuse new completions and wait for the present ones."""
        drained = await drain(self._engine, drain_seconds(request))
        aborted = drained.aborted_count
        return pb.DrainResponse(
            finished_count=len(drained.requests) - aborted, aborted_count=aborted
        )

    async def Chat(
        self,
        request: pb.ChatRequest,
        context: _Context,
    ) -> AsyncGenerator[pb.ChatResponse]:
        """Stream the answer to a conversation."""
        model = model_for_call(self._engine, request.request_id, request.model)
        draft, answer = await chat_draft(self._renderer, model, request)
        async with generate(self._engine, model, draft, context) as generation:
            texts = _token_texts(model, generation)
            async for delta in generation.stream.deltas():
                yield await chat_message(delta_message(delta, texts), delta, answer)

    async def RenderChat(
        self,
        request: pb.RenderChatRequest,
        context: _Context,
    ) -> pb.RenderChatResponse:
        """Render a conversation."""
        model = self._engine.model(request.model)
        conversation = await asyncio.to_thread(conversation_of, request)
        prompt = await chat_prompt(
            self._renderer, model, conversation, _MAX_ANSWER_TOKENS, literal=request.literal
        )
        size = len(prompt.text.encode()) + 3 * len(prompt.token_ids)
        if prompt.fewest or size > _MAX_ANSWER_BYTES:
            problem = f"an answer holds at most {_MAX_ANSWER_BYTES} bytes of text and token ids"
            raise InvalidField([("messages", f"the prompt is too long: {problem}")])
        return pb.RenderChatResponse(prompt=prompt.text, token_ids=prompt.token_ids)

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Split text into token ids."""
        model = self._engine.model(request.model)
        codec, literal = model.codec, request.literal
        if fewest := await too_many(request.content, _MAX_ANSWER_TOKENS, codec, literal=literal):
            raise _too_many_tokens(f"at least {fewest}")
        ids = await asyncio.to_thread(
            codec.encode, request.content, as_prompt=request.add_special_tokens, literal=literal
        )
        if len(ids) > _MAX_ANSWER_TOKENS:
            raise _too_many_tokens(str(len(ids)))
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: _Context,
    ) -> pb.DetokenizeResponse:
        """Join token ids into text."""
        model = self._engine.model(request.model)
        count = len(request.token_ids)
        if count > _MAX_REQUEST_TOKENS:
            problem = f"{count} token ids; at most {_MAX_REQUEST_TOKENS}; split them"
            raise InvalidField([("token_ids", problem)])
        check_token_ids("token_ids", request.token_ids, model.info.vocab_size)
        text = await asyncio.to_thread(model.codec.decode, request.token_ids)
        size = len(text.encode())
        if size > _MAX_ANSWER_BYTES:
            problem = f"their text has {size} bytes; an answer holds at most {_MAX_ANSWER_BYTES}"
            raise InvalidField([("token_ids", problem)])
        return pb.DetokenizeResponse(content=text)


def _too_many_tokens(count: str) -> InvalidField:
    text = f"{count} tokens; an answer holds at most {_MAX_ANSWER_TOKENS}; split the text"
    return InvalidField([("content", text)])


async def _outcome(command: ModelCommand[_T]) -> _T:
    try:
        return await asyncio.wrap_future(command.future)
    except asyncio.CancelledError:
        command.cancelled.set()
        raise


def _token_texts(model: ModelHandle, generation: GenerationRequest) -> TokenTexts | None:
    """Return the decoder for the tokens of log probabilities; None if none were requested."""
    spec = generation.spec
    if spec.sampling.logprobs is None:
        return None
    return TokenTexts(model.codec, spec.prompt_ids, generation.end_ids)


def _prompt_texts(model: ModelHandle, generation: GenerationRequest) -> PromptTexts | None:
    """Return the decoder for the prompt's log probabilities; None if none were requested."""
    spec = generation.spec
    if spec.sampling.prompt_logprobs is None:
        return None
    return PromptTexts(model.codec, spec.prompt_ids)
