"""Parsing of streamed completions over HTTP."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench.contenders._sse import read_head, take_stream
from bench.records import ContenderError, Record

_HEAD = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
_TOKEN = b'data: {"choices": [{"index": 0, "text": " a", "finish_reason": null}]}\n\n'
_EMPTY = b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}\n\n'
_USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'


def _reader(*parts: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join(parts))
    reader.feed_eof()
    return reader


async def test_token_counts_come_from_the_usage() -> None:
    record = Record()
    keepalive = b": keepalive 3/7\n\n"
    reader = _reader(_HEAD, keepalive, _TOKEN, _TOKEN, _EMPTY, _USAGE, b"data: [DONE]\n\n")
    await read_head(reader)
    await take_stream(reader, record)
    assert len(record.chunks) == 2
    assert (record.prompt_tokens, record.completion_tokens) == (7, 3)


async def test_a_stream_without_done_fails() -> None:
    with pytest.raises(ContenderError, match="the stream ended without"):
        await take_stream(_reader(_TOKEN), Record())


async def test_an_http_error_includes_the_body() -> None:
    reader = _reader(b"HTTP/1.0 404 Not Found\r\n\r\n", b'{"error": "generation thread died"}')
    with pytest.raises(ContenderError, match="generation thread died"):
        await read_head(reader)


async def test_a_closed_connection_is_reported() -> None:
    with pytest.raises(ContenderError, match="closed the connection"):
        await read_head(_reader())
