"""Streamed completions of OpenAI's HTTP interface, called with plain HTTP/1.1 over asyncio streams.

Messages have text rather than tokens, so each counts as one token and the ``usage`` at the end
gives the token count. Each request opens a new connection.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from bench.records import TEMPERATURE, TOP_K, TOP_P, ContenderError, Record, Request

_DATA = b"data: "
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 2**24
_CONNECT_ATTEMPTS = 100
_RETRY_SECONDS = 0.01


async def complete(port: int, body: dict[str, Any], record: Record, *, whole: bool = False) -> None:
    """Run one completion.

    Args:
        port: Port of the server on this machine.
        body: Body of the request.
        record: Receives times and counts.
        whole: The answer is not streamed and has token ids.

    Raises:
        ContenderError: The server failed.
    """
    reader, writer = await _accepted(port, body)
    try:
        if whole:
            _take_whole(json.loads(await reader.read()), record)
        else:
            await take_stream(reader, record)
    except (OSError, EOFError) as error:
        raise ContenderError(f"{type(error).__name__}: {error}") from error
    finally:
        writer.close()


def options_of(request: Request) -> dict[str, Any]:
    """Return the fields of a request's body other than the prompt."""
    body: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": not request.want_ids,
    }
    if request.want_ids:
        body["logprobs"] = True
    else:
        body["stream_options"] = {"include_usage": True}
    if request.sampled:
        body |= {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K}
    return body


async def _accepted(
    port: int, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request until the server takes it, and read the head of the response.

    The queue of new connections of mlx-lm's server holds five, so some of many that come at once
    are reset. The time until one is taken counts as the request's.
    """
    for _ in range(_CONNECT_ATTEMPTS):
        try:
            reader, writer = await _post(port, body)
            await read_head(reader)
        except ConnectionError:
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return reader, writer
    raise ContenderError(f"{_CONNECT_ATTEMPTS} connections were reset")


async def _post(
    port: int, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_MAX_LINE_BYTES)
    writer.write(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + payload)
    return reader, writer


async def read_head(reader: asyncio.StreamReader) -> None:
    """Read the head of a response.

    Raises:
        ContenderError: The status is not 200.
    """
    status = await reader.readline()
    while (await reader.readline()).strip():
        pass
    if b" 200 " not in status:
        answer = (status + await reader.read()).decode(errors="replace")
        raise ContenderError(answer.strip()[:200] or "the server closed the connection")


async def take_stream(reader: asyncio.StreamReader, record: Record) -> None:
    """Read the events of a streamed completion to their end."""
    while line := await reader.readline():
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        message = json.loads(data)
        if message.get("usage"):
            _take_usage(message, record)
        elif message["choices"][0]["text"]:
            record.chunks.append((time.monotonic(), 1))
    raise ContenderError("the stream ended without [DONE]")


def _take_whole(message: dict[str, Any], record: Record) -> None:
    _take_usage(message, record)
    content = message["choices"][0]["logprobs"]["content"]
    record.token_ids = [token["id"] for token in content]
    record.chunks.append((time.monotonic(), len(record.token_ids)))


def _take_usage(message: dict[str, Any], record: Record) -> None:
    record.prompt_tokens = message["usage"]["prompt_tokens"]
    record.completion_tokens = message["usage"]["completion_tokens"]
