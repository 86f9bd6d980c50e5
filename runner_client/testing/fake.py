"""The fake runner."""

# ruff: noqa: N802 - gRPC methods are named as in the proto
from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.testing.answers import embed_message, prompt_message, token_messages
from runner_client.testing.call import FakeCall
from runner_client.testing.failure import Failure
from runner_client.testing.health import health_handler
from runner_client.testing.messages import (
    as_chat,
    as_completion,
    capabilities,
    need_message,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message

_MAX_CALLS = 32
_POLL_SECONDS = 0.005

_WATCH_SECONDS = 0.02
"""Time between two looks at the settings of the fake, which tests change at any time."""


@dataclass(eq=False)
class FakeRunner(runner_pb2_grpc.RunnerServiceServicer):
    """Behaviour of a fake runner; may be changed between calls. Created by ``fake_runner``."""

    pieces: Sequence[str] = ("Hello", " world")
    """The text of every completion; each piece is one chunk and one token, whose id is its
    number."""
    reasoning: Sequence[str] = ()
    """The reasoning of every answer to a conversation, as ``pieces``."""
    tool_calls: Sequence[pb.ToolCall] = ()
    """The calls at the end of every answer to a conversation with tools."""
    failure: Failure | None = None
    """The error for every call except Status and health."""
    fail_after: int = 0
    """How many pieces a completion sends before it fails."""
    stall_after: int | None = None
    """How many pieces a completion sends before it goes silent until the client gives up."""
    piece_delay_seconds: float = 0.0
    """Delay before each piece and each progress message."""
    progress_messages: int = 0
    """How many messages with only prompt progress precede the text."""
    is_complete: bool = True
    """Whether the last message (``done``) is sent."""
    ends_after_done: bool = True
    """Whether the stream ends after its last message, as the proto specifies."""
    load_seconds: float = 0.0
    """Duration of a load; infinity for a load without progress."""
    prompt_cached_count: int = 0
    """The number of tokens of every prompt reported as taken from the prefix cache, unless the
    request bypasses it."""
    prefix_cache_bytes: int = 0
    """The reported size of the prefix cache; a trim reduces it."""
    model_bytes: int = 2**30
    """The reported need of every model as float32; as stored and in 16 bits it is half."""
    available_bytes: int = 2**40
    """The reported available memory; a load that needs more is refused."""
    has_chat_template: bool = True
    """Whether the model is reported to have a chat template."""
    embedding_dimension: int = 0
    """The number of values in a vector; 0 for a model that does not embed texts."""
    embed_seconds: float = 0.0
    """Duration of every embedding."""
    dtype_fallback: bool = False
    """Whether the model is reported as held as stored for lack of memory."""
    blas: str = ""
    """The reported BLAS library."""
    model: str | None = "fake"
    """The loaded model; None until a Load."""
    is_draining: bool = False
    """Whether a drain keeps new completions out."""
    address: str = ""
    """The address of the server, as passed to gRPC."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapters of the loaded model: directories by name. Requests with other adapters are
    refused."""
    requests: list[Message] = field(default_factory=list)
    """Every request received except Status and health, as protobuf messages."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set once a client has cancelled a load or a completion."""
    _load_began: float | None = None
    _is_stored: bool = False
    _kv_bits: int = 0
    _draft_model: str = ""
    _calls: list[FakeCall] = field(default_factory=list)

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> pb.LoadResponse:
        """Take ``load_seconds``, then report the requested model as loaded."""
        self._receive(request, context)
        need = self._need(request)
        if not (need.fits or request.memory_override):
            self._refuse(need, context)
        self._load_began = time.monotonic()
        try:
            call = FakeCall(context, self.cancelled)
            call.wait(self.load_seconds)
            call.is_over = True
        finally:
            self._load_began = None
        self.is_draining = False
        self.model, self._is_stored = request.model, bool(need.notes)
        self._kv_bits = request.kv_bits
        self.adapters = {adapter.name: adapter.path for adapter in request.adapters}
        self._draft_model = request.draft_model
        return pb.LoadResponse(model=self._model(self.model))

    def Estimate(
        self, request: pb.EstimateRequest, context: grpc.ServicerContext
    ) -> pb.EstimateResponse:
        """Compare ``model_bytes`` with ``available_bytes``."""
        self._receive(request, context)
        return self._need(request)

    def Trim(self, request: pb.TrimRequest, context: grpc.ServicerContext) -> pb.TrimResponse:
        """Reduce ``prefix_cache_bytes``."""
        self._receive(request, context)
        self._check_name(request.model, context)
        if self._load_began is not None:
            Failure("BUSY", "a load is running; wait for it").abort(context)
        freed = max(0, self.prefix_cache_bytes - request.prefix_cache_bytes)
        self.prefix_cache_bytes -= freed
        return pb.TrimResponse(freed_bytes=freed)

    def Unload(self, request: pb.UnloadRequest, context: grpc.ServicerContext) -> pb.UnloadResponse:
        """Unload the model."""
        self._receive(request, context)
        self._check_name(request.model, context)
        self.model, self.is_draining = None, False
        return pb.UnloadResponse()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        """Report whether a model is loaded, or the progress of a load."""
        self._check_name(request.model, context)
        began = self._load_began
        memory = pb.MemoryUsage(prefix_cache_bytes=self.prefix_cache_bytes)
        status = pb.StatusResponse(
            pid=os.getpid(), runner_id="fake", memory_usage=memory, blas=self.blas
        )
        if began is not None:
            status.state = pb.STATE_LOADING
            share = (time.monotonic() - began) / max(self.load_seconds, 0.001)
            status.progress = min(99, int(100 * share))
        elif self.model is not None:
            status.state = pb.STATE_DRAINING if self.is_draining else pb.STATE_ACTIVE
            status.progress = 100
            status.model.CopyFrom(self._model(self.model))
        else:
            status.state = pb.STATE_IDLE
        return status

    def WatchStatus(
        self,
        request: pb.WatchStatusRequest,
        context: grpc.ServicerContext,
    ) -> Iterator[pb.WatchStatusResponse]:
        """Report the status, also after changes and at the interval, until ``failure`` is set."""
        self.requests.append(request)
        self._check_name(request.model, context)
        interval = request.interval.ToNanoseconds() / 1e9
        call = FakeCall(context, threading.Event())
        sent, sent_at = None, 0.0
        while True:
            if self.failure is not None:
                self.failure.abort(context)
            status = self.Status(pb.StatusRequest(), context)
            is_due = interval and time.monotonic() >= sent_at + interval
            if status != sent or is_due:
                sent, sent_at = status, time.monotonic()
                yield pb.WatchStatusResponse(status=status)
            call.wait(_WATCH_SECONDS)

    def Completion(
        self, request: pb.CompletionRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CompletionResponse]:
        """Send the progress, the pieces and the last message."""
        return self._complete(request, context)

    def Chat(
        self, request: pb.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ChatResponse]:
        """Send the reasoning, the same as for a completion, and the tool calls."""
        calls = self.tool_calls if request.tools else ()
        return as_chat(self._complete(request, context), self.reasoning, calls)

    def _complete(
        self, request: pb.CompletionRequest | pb.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CompletionResponse]:
        self.requests.append(request)
        self._need_model(request.model, context)
        if request.adapter and request.adapter not in self.adapters:
            text = f"the loaded model has no adapter {request.adapter!r}"
            violations = [("adapter", text)]
            Failure("INVALID_FIELD", f"adapter: {text}", field_violations=violations).abort(context)
        if self.is_draining:
            Failure("SHUTTING_DOWN", "the runner is draining").abort(context)
        if not self.progress_messages:
            self._fail_if_told(context, sent=0)
        # Like the runner, send headers once the completion is accepted.
        context.send_initial_metadata(())
        call = FakeCall(context, self.cancelled, request.request_id)
        self._calls.append(call)
        try:
            yield from self._stream(as_completion(request), context, call)
        finally:
            self._calls.remove(call)

    def _stream(
        self, request: pb.CompletionRequest, context: grpc.ServicerContext, call: FakeCall
    ) -> Iterator[pb.CompletionResponse]:
        for number in range(self.progress_messages):
            call.wait(self.piece_delay_seconds)
            progress = pb.PromptProgress(evaluated_count=number, total_count=self.progress_messages)
            yield pb.CompletionResponse(prompt_progress=progress)
        if scored := prompt_message(request):
            yield scored
        messages = token_messages(request, self.pieces)
        for number, message in enumerate(messages):
            self._fail_if_told(context, sent=number)
            call.wait(math.inf if number == self.stall_after else self.piece_delay_seconds)
            yield message
        self._fail_if_told(context, sent=len(messages))
        if self.is_complete:
            yield pb.CompletionResponse(
                done=True,
                done_reason=pb.DONE_REASON_STOP,
                eval_count=len(messages),
                prompt_cached_count=0 if request.bypass_prefix_cache else self.prompt_cached_count,
                constraint_satisfied=True if request.HasField("constraint") else None,
            )
        if not self.ends_after_done:
            call.wait(math.inf)
        call.is_over = True

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        """End the running completions with one of the ids."""
        self._receive(request, context)
        found = [call for call in list(self._calls) if call.request_id in request.request_ids]
        return pb.AbortResponse(aborted_count=sum(call.abort() for call in found))

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        """Refuse new completions, and wait for the running ones."""
        self._receive(request, context)
        running = list(self._calls)
        self.is_draining, is_drained = self.model is not None, False
        try:
            aborted = self._wait_for(running, request, FakeCall(context, self.cancelled))
            is_drained = True
        finally:
            self.is_draining = self.is_draining and is_drained
        return pb.DrainResponse(finished_count=len(running) - aborted, aborted_count=aborted)

    def _wait_for(self, running: list[FakeCall], request: pb.DrainRequest, drain: FakeCall) -> int:
        """Wait for completions, abort the rest when the time is over, and return their number."""
        timeout = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else math.inf
        deadline, aborted = time.monotonic() + timeout, 0
        while any(call in self._calls for call in running):
            if time.monotonic() >= deadline:
                aborted += sum(call.abort() for call in running)
            drain.wait(_POLL_SECONDS)
        drain.is_over = True
        return aborted

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        """Return the code points of the characters as token ids."""
        self._receive(request, context)
        self._need_model(request.model, context)
        return pb.TokenizeResponse(token_ids=map(ord, request.content))

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        """Return vectors that depend on the texts only."""
        self._receive(request, context)
        self._need_model(request.model, context)
        if self.is_draining:
            Failure("SHUTTING_DOWN", "the runner is draining").abort(context)
        if not self.embedding_dimension:
            Failure("MODEL_UNSUPPORTED", "this model does not embed texts").abort(context)
        call = FakeCall(context, self.cancelled)
        call.wait(self.embed_seconds)
        call.is_over = True
        return embed_message(request, self.embedding_dimension)

    def RenderChat(
        self, request: pb.RenderChatRequest, context: grpc.ServicerContext
    ) -> pb.RenderChatResponse:
        """Return the messages' texts, one in each line, and the code points as token ids."""
        self._receive(request, context)
        self._need_model(request.model, context)
        prompt = "\n".join(map(text_of, request.messages))
        return pb.RenderChatResponse(prompt=prompt, token_ids=map(ord, prompt))

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        """Return the text of code points: the inverse of ``Tokenize``."""
        self._receive(request, context)
        self._need_model(request.model, context)
        return pb.DetokenizeResponse(content="".join(map(chr, request.token_ids)))

    def _need(self, request: pb.LoadRequest | pb.EstimateRequest) -> pb.EstimateResponse:
        return need_message(request, self.model_bytes, self.available_bytes)

    def _refuse(self, need: pb.EstimateResponse, context: grpc.ServicerContext) -> NoReturn:
        numbers = {
            "requiredBytes": str(need.required_bytes),
            "availableBytes": str(need.available_bytes),
        }
        Failure("INSUFFICIENT_MEMORY", "the model does not fit", metadata=numbers).abort(context)

    def _model(self, name: str) -> pb.Model:
        is_fallback = self.dtype_fallback or self._is_stored
        accepted = capabilities(
            has_cache=self.prefix_cache_bytes > 0,
            has_template=self.has_chat_template,
            dimension=self.embedding_dimension,
        )
        adapters = [pb.Adapter(name=key, path=path) for key, path in self.adapters.items()]
        model = pb.Model(
            name=name,
            path=name,
            dtype_fallback=is_fallback,
            capabilities=accepted,
            kv_bits=self._kv_bits,
            adapters=adapters,
        )
        if self._draft_model:
            model.draft_model.MergeFrom(
                pb.DraftModel(name=self._draft_model, path=self._draft_model)
            )
        return model

    def _receive(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failure is not None:
            self.failure.abort(context)

    def _fail_if_told(self, context: grpc.ServicerContext, *, sent: int) -> None:
        if self.failure is not None and sent >= self.fail_after:
            self.failure.abort(context)

    def _need_model(self, name: str, context: grpc.ServicerContext) -> None:
        if self.model is None:
            Failure("MODEL_NOT_LOADED", "no model is loaded").abort(context)
        self._check_name(name, context)

    def _check_name(self, name: str, context: grpc.ServicerContext) -> None:
        if name not in ("", self.model):
            text = f"the loaded model is {self.model!r}, and the call names {name!r}"
            Failure("MODEL_NOT_LOADED", text, metadata={"model": name}).abort(context)


@contextmanager
def fake_runner(
    *,
    pieces: Sequence[str] = ("Hello", " world"),
    failure: Failure | None = None,
    listen: Literal["tcp", "unix"] = "tcp",
) -> Iterator[FakeRunner]:
    """Run a fake runner on the loopback address, or on a unix socket.

    Args:
        pieces: The text of every completion, in chunks.
        failure: The error for every call, if given.
        listen: The kind of address; the block releases the address at its end.

    Yields:
        The runner, with its ``address``, the received ``requests`` and settings to change.
    """
    runner = FakeRunner(pieces=pieces, failure=failure)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_MAX_CALLS))
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0),))
        stack.callback(lambda: server.stop(None).wait())
        runner_pb2_grpc.add_RunnerServiceServicer_to_server(runner, server)
        server.add_generic_rpc_handlers((health_handler(),))
        if listen == "unix":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-fake-"))
            runner.address = f"unix:{folder}/runner.sock"
            server.add_insecure_port(runner.address)
        else:
            runner.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield runner
