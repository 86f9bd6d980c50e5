"""Several answers to one prompt, each a request of its own in the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runner_server.api.contracts.vllm.convert import Answer
from runner_server.api.contracts.vllm.validation import GenerateCall, Message
from runner_server.api.generation import GenerationDraft, generate
from runner_server.api.prompts import encode_prompt
from runner_server.engine.backend import ModelHandle
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.types import GenerationStats
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    import grpc


class _SentOnce:
    """Sends the headers of a call with the first of its requests only."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._is_sent = False

    async def send_initial_metadata(self, metadata: Sequence[Any]) -> None:
        """Send the headers unless they were sent before, which gRPC does not allow."""
        if not self._is_sent:
            self._is_sent = True
            await self._context.send_initial_metadata(metadata)


@asynccontextmanager
async def samples(
    engine: Engine,
    model: ModelHandle,
    call: GenerateCall,
    context: grpc.aio.ServicerContext[Any, Any],
) -> AsyncIterator[list[GenerationRequest]]:
    """Submit the requests of a call for the duration of a context; see ``generate``.

    The first that the engine refuses fails the call, and the others are cancelled.
    """
    first = call.draft
    if call.count > 1:
        # Once for all answers.
        ids = await encode_prompt(first.prompt, model)
        first = replace(first, prompt=replace(first.prompt, content=ids))
    headers: Any = _SentOnce(context)
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(generate(engine, model, draft, headers))
            for draft in _drafts(first, call.count)
        ]
        current_call().stats = lambda: _total([request.stats() for request in running])
        yield running


def _drafts(first: GenerationDraft, count: int) -> list[GenerationDraft]:
    """Return the drafts of all answers, which differ in their seeds."""
    sampling = first.sampling
    # Modulo, because a random seed may be near the end of the range.
    seeds = [(sampling.seed + index) % 2**63 if index else sampling.seed for index in range(count)]
    return [replace(first, sampling=replace(sampling, seed=seed)) for seed in seeds]


def _total(all_stats: Sequence[GenerationStats]) -> GenerationStats:
    """Return the statistics of a call: the prompt once, the tokens of all answers."""
    first = all_stats[0]
    return replace(
        first,
        eval_count=sum(stats.eval_count for stats in all_stats),
        drafted_count=sum(stats.drafted_count for stats in all_stats),
        accepted_count=sum(stats.accepted_count for stats in all_stats),
    )


async def messages(
    running: Sequence[GenerationRequest], *, is_stream: bool
) -> AsyncIterator[Message]:
    """Yield the messages of all answers, as they come if streamed."""
    if len(running) == 1:
        async for message in _answer(running[0], 0, is_stream=is_stream):
            yield message
        return
    # One message in flight, so that a slow reader of the call slows down all its answers.
    queue: asyncio.Queue[Message | None] = asyncio.Queue(1)

    async def forward(index: int, request: GenerationRequest) -> None:
        async for message in _answer(request, index, is_stream=is_stream):
            await queue.put(message)

    async def forward_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(running):
                    group.create_task(forward(index, request))
        except BaseExceptionGroup as failed:
            # A call has one error: the first.
            raise failed.exceptions[0] from None
        await queue.put(None)

    reading = asyncio.create_task(forward_all())
    reading.add_done_callback(lambda done: _wake(queue, done))
    try:
        while (message := await queue.get()) is not None:
            yield message
        await reading
    finally:
        reading.cancel()


def _wake(queue: asyncio.Queue[Message | None], reading: asyncio.Task[None]) -> None:
    """End the reader of a queue whose writers failed."""
    if reading.cancelled() or reading.exception():
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(None)


async def _answer(
    request: GenerationRequest, index: int, *, is_stream: bool
) -> AsyncIterator[Message]:
    answer = Answer(request, index, is_stream=is_stream)
    async for delta in request.stream.deltas():
        if message := answer.add(delta):
            yield message
    yield answer.complete()
