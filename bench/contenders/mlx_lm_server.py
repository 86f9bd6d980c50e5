"""mlx-lm's HTTP server.

The server streams text, so each message counts as one token and the ``usage`` at the end gives the
token count. Prompts are text only; the load generator checks that the server counts as many prompt
tokens as the other contenders receive. Requests with a seed are served one at a time, so none is
sent. The server closes the connection after each response, so each request opens a new one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from bench.contenders._environment import environment
from bench.contenders.base import PARALLEL, Probe, Server, free_port
from bench.records import TEMPERATURE, TOP_K, TOP_P, ContenderError, Record, Request

_DATA = b"data: "
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 2**24
_CONNECT_ATTEMPTS = 100
_RETRY_SECONDS = 0.01


class MlxLmServer(Server):
    """``python -m mlx_lm server``, called with plain HTTP/1.1 over asyncio streams."""

    name = "mlx-lm server"

    async def start(self) -> None:
        """Start the server, which listens while the model loads and makes requests wait."""
        self.port = free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(self.setup.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--decode-concurrency", str(PARALLEL), "--log-level", "WARNING"]
        await self._spawn(command, environment(self.setup.blas))
        await self._listening()

    async def stream(self, request: Request, record: Record) -> None:
        """Stream one completion, or fetch a whole one if token ids are wanted."""
        reader, writer = await self._accepted(_body(request))
        try:
            if request.want_ids:
                _take_whole(json.loads(await reader.read()), record)
            else:
                await _take_stream(reader, record)
        except (OSError, EOFError) as error:
            raise ContenderError(f"{type(error).__name__}: {error}") from error
        finally:
            writer.close()

    def probes(self) -> dict[str, Probe]:
        """Return the call ``GET /health``."""
        return {"health": self._check}

    async def _check(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await _read_head(reader)
        await reader.read()
        writer.close()

    async def _accepted(
        self, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request until the server takes it, and read the head of the response.

        The server's queue of new connections holds five, so it resets some of many that come at
        once. The time until one is taken counts as the request's.
        """
        for _ in range(_CONNECT_ATTEMPTS):
            try:
                reader, writer = await self._post(body)
                await _read_head(reader)
            except ConnectionError:
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return reader, writer
        raise ContenderError(f"{_CONNECT_ATTEMPTS} connections were reset")

    async def _post(
        self, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}"
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=_MAX_LINE_BYTES
        )
        writer.write(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + payload)
        return reader, writer


def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": request.prompt.text,
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


async def _read_head(reader: asyncio.StreamReader) -> None:
    status = await reader.readline()
    while (await reader.readline()).strip():
        pass
    if b" 200 " not in status:
        answer = (status + await reader.read()).decode(errors="replace")
        raise ContenderError(answer.strip()[:200] or "the server closed the connection")


async def _take_stream(reader: asyncio.StreamReader, record: Record) -> None:
    while line := await reader.readline():
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        message = json.loads(data)
        if "usage" in message:
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
