"""Targets of fuzzing: take one request, return the outcome, raise on a violated property."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api import convert, validation
from runner_server.api.chat.conversation import conversation_of
from runner_server.api.violations import check_token_ids
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.output.token_text import TokenTexts
from runner_server.engine.types import FinishReason, GenerationResult, OutputDelta
from runner_server.errors import RunnerFault, to_status
from support.call_outcomes import ANSWER_SECONDS, Caller
from support.fakes import VOCAB_SIZE, ByteCodec, FakeBackend, model_info
from support.harness import Server, joined, running
from support.hostile_requests import METHODS, Call

_CONTEXT_LENGTH = 128
_CALLS_BETWEEN_STREAMS = 10
_NEIGHBOUR: dict[str, Any] = {"seed": 5, "num_predict": 100}


class Target(Protocol):
    """Receiver of fuzzed requests."""

    def send(self, call: Call) -> str:
        """Send one request and return the outcome."""
        ...

    def close(self) -> str:
        """End the target and return a summary of the run."""
        ...


class Parsing:
    """Decode and validate a request as far as the engine, without gRPC: thousands a second."""

    def __init__(self) -> None:
        self._codec = ByteCodec()
        self._info = replace(model_info(), context_length=_CONTEXT_LENGTH)
        self._classes = {method.name: GetMessageClass(method.input_type) for method in METHODS}

    def send(self, call: Call) -> str:
        """See ``Target.send``."""
        name, data = call
        try:
            request = self._classes[name].FromString(data)
        except DecodeError:
            return "no message"
        try:
            self._check(request)
        except RunnerFault as fault:
            status = to_status(fault)
            assert status.ByteSize() < 2048, status
            return pb.ErrorReason.Name(fault.reason)
        return "OK"

    def close(self) -> str:
        """See ``Target.close``."""
        return "every request was read and checked, or refused with a reason"

    def _check(self, request: Message) -> None:
        match request:
            case pb.LoadRequest():
                spec = validation.load_spec(request)
                assert convert.model_message(model_info(spec))
            case pb.EstimateRequest():
                validation.load_spec(request)
            case pb.TrimRequest():
                assert validation.trim_bytes(request) >= 0
            case pb.AbortRequest():
                assert validation.abort_ids(request)
            case pb.DrainRequest():
                seconds = validation.drain_seconds(request)
                assert seconds is None or 0 <= seconds <= 86_400
            case pb.WatchStatusRequest():
                interval = validation.watch_interval(request)
                assert interval is None or 0.1 <= interval <= 3600
            case pb.CompletionRequest():
                self._check_completion(request)
            case _:
                self._check_texts(request)

    def _check_texts(self, request: Message) -> None:
        match request:
            case pb.TokenizeRequest():
                self._codec.encode(request.content, as_prompt=request.add_special_tokens)
            case pb.RenderChatRequest() | pb.ChatRequest():
                assert conversation_of(request).messages
            case pb.DetokenizeRequest():
                check_token_ids("token_ids", request.token_ids, VOCAB_SIZE)
                self._codec.decode(request.token_ids)

    def _check_completion(self, request: pb.CompletionRequest) -> None:
        draft = validation.completion_draft(request, self._info)
        if request.WhichOneof("input") == "prompt":
            ids = self._codec.encode(request.prompt, as_prompt=True)
        else:
            ids = list(request.prompt_token_ids.ids)
        spec = draft.fit(ids, self._info)
        assert 1 <= spec.max_tokens <= self._info.context_length - len(spec.prompt_ids)
        top = tuple((i, -1.0) for i in range(spec.sampling.logprobs or 0))
        done = GenerationResult(FinishReason.STOP, (*spec.stop, "")[0], len(ids), 1, 0.0, 0.0, 0.0)
        delta = OutputDelta("text", (ids[-1],), (TokenLogprob(ids[-1], -1.0, top),), done=done)
        texts = TokenTexts(self._codec, spec.prompt_ids, self._info.eos_token_ids)
        assert convert.delta_message(delta, texts).ByteSize()


class Wire:
    """A real server with the fake model library, in a separate thread, and a neighbour stream.

    The neighbour reads a seeded stream again and again, whose text must always be the same.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = Path(tempfile.mkdtemp(prefix="mr-"))
        self._streams = 0
        self._calls = 0
        self._neighbour: asyncio.Task[None] | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(self._open())

    def send(self, call: Call) -> str:
        """See ``Target.send``."""
        return str(self._run(self._send(call)))

    def close(self) -> str:
        """See ``Target.close``."""
        self._run(self._close())
        shutil.rmtree(self._folder)
        slowest = self._caller.slowest_seconds * 1000
        return f"slowest answer {slowest:.0f} ms, {self._streams} neighbouring streams unchanged"

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * ANSWER_SECONDS)

    async def _open(self) -> None:
        backend = FakeBackend()
        self._running = running(self._folder, backend)
        app, channel, ready = await self._running.__aenter__()
        self._server = Server(app, backend, channel, ready)
        self._caller = Caller(channel)
        await self._server.load(context_length=_CONTEXT_LENGTH)
        self._alone = await self._server.text("neighbour", **_NEIGHBOUR)

    async def _send(self, call: Call) -> str:
        if call[0] in {"Load", "Unload", "Drain"}:
            return await self._change_model(call)
        self._calls += 1
        if self._neighbour is None and self._calls % _CALLS_BETWEEN_STREAMS == 0:
            self._neighbour = self._loop.create_task(self._read_on())
        ending = await self._caller.send(call)
        if self._neighbour and self._neighbour.done():
            await self._check_neighbour()
        return ending

    async def _change_model(self, call: Call) -> str:
        """Let the neighbour finish first: loads and unloads end streams by design."""
        await self._check_neighbour()
        ending = await self._caller.send(call)
        await self._server.load(context_length=_CONTEXT_LENGTH)
        return ending

    async def _check_neighbour(self) -> None:
        task, self._neighbour = self._neighbour, None
        if task:
            await task

    async def _read_on(self) -> None:
        text = joined(await self._server.complete("neighbour", **_NEIGHBOUR))
        assert text == self._alone, "a neighbour got another text"
        self._streams += 1

    async def _close(self) -> None:
        await self._check_neighbour()
        await self._server.settled()
        await self._server.assert_nothing_left()
        status = await self._server.status()
        assert (status.running_count, status.queued_count) == (0, 0), status
        assert status.state == pb.STATE_ACTIVE, status
        await self._running.__aexit__(None, None, None)
