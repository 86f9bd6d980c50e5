"""``POST /api/chat`` and ``POST /api/generate``."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.ollama.hosting import check_keep_alive, hosted_name, on_accept, ready
from runner_common.http.ollama.reasoning import decide_reasoning
from runner_common.http.ollama.translation.answers import Answer, Stopwatch, line
from runner_common.http.ollama.translation.requests import read_chat, read_generate

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host
    from runner_common.http.ollama.translation.requests import Generation

    Responses = AsyncGenerator[pb.ChatResponse | pb.CompletionResponse, None]

_STREAM_TYPE = "application/x-ndjson"


async def chat(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Answer a conversation, or load or unload the model if there is none."""
    await _generate(host, exchange, read_chat(body))


async def generate(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Answer a prompt, or load or unload the model if there is none."""
    await _generate(host, exchange, read_generate(body))


async def _generate(host: Host, exchange: Exchange, wanted: Generation) -> None:
    stopwatch = Stopwatch()
    check_keep_alive(host, exchange, wanted)
    model = await hosted_name(host, exchange, wanted.model)
    answer = Answer(wanted.model, is_chat=wanted.is_chat, stopwatch=stopwatch)
    if wanted.request is None:
        reason = await _without_prompt(host, exchange, wanted, model)
        await exchange.send_json(answer.ended(reason))
        return
    if wanted.think is not None or wanted.num_ctx is not None:
        status = await ready(host, exchange, wanted, model)
        await decide_reasoning(wanted, status.model)
    request = wanted.request
    request.model = model
    call = exchange.call.accepting(on_accept(host, wanted, model, stopwatch))
    responses: Responses = (
        host.chat(request, call)
        if isinstance(request, pb.ChatRequest)
        else host.completion(request, call)
    )
    async with aclosing(responses):
        send = _send_parts if wanted.is_stream else _send_whole
        await send(exchange, answer, responses)


async def _without_prompt(host: Host, exchange: Exchange, wanted: Generation, model: str) -> str:
    """Load or unload the model; return which of both."""
    if wanted.keep_alive == 0 and host.keeper is not None:
        await host.keeper.unload(model)
        return "unload"
    await ready(host, exchange, wanted, model)
    await on_accept(host, wanted, model)()
    return "load"


async def _send_parts(exchange: Exchange, answer: Answer, responses: Responses) -> None:
    async for response in responses:
        part = answer.part(response)
        if part is None:
            continue
        if not exchange.has_begun:
            await exchange.begin_stream(_STREAM_TYPE)
        if response.done:
            await exchange.end_stream(line(part))
        else:
            await exchange.send_part(line(part))


async def _send_whole(exchange: Exchange, answer: Answer, responses: Responses) -> None:
    async for response in responses:
        if (whole := answer.add(response)) is not None:
            await exchange.send_json(whole)
