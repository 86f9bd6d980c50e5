"""Failures of the host, before and after the first part of an answer."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.app import make_app
from runner_common.http.call import HttpCall
from runner_common.http.guard import Guard
from runner_common.http.host import StatusError
from runner_common.serving.statuses import error_status, retry_info

pytest.importorskip("starlette", reason="starlette is not installed (the extra http)")

GONE = error_status("SHUTTING_DOWN", "the model's runner is gone")
FULL = error_status("QUEUE_FULL", "128 requests wait", details=(retry_info(2.5),))


class FailingHost:
    """A host whose answers end with an error.

    Args:
        error: The error.
        count: Number of parts before it.
    """

    keeper = None

    def __init__(self, error: Any, count: int = 0) -> None:
        self._error = StatusError(error)
        self._count = count

    async def chat(
        self, _request: pb.ChatRequest, call: HttpCall
    ) -> AsyncGenerator[pb.ChatResponse, None]:
        """Stream the parts, and fail."""
        await call.send_initial_metadata(())
        for _ in range(self._count):
            yield pb.ChatResponse(content="a")
        raise self._error

    def problem(self) -> None:
        """Accept requests."""


async def ask(host: Any, **fields: Any) -> httpx.Response:
    app = make_app(host, Guard(None, None, is_encrypted=False))
    transport = httpx.ASGITransport(app)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post("/api/chat", json=body)


async def test_a_failure_after_the_first_part_is_the_last_line() -> None:
    answer = await ask(FailingHost(GONE, count=2))
    *parts, last = map(json.loads, answer.text.splitlines())
    assert answer.status_code == 200
    assert [part["message"]["content"] for part in parts] == ["a", "a"]
    assert last == {"error": "the model's runner is gone"}


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_failure_before_the_first_part_has_a_status(*, is_stream: bool) -> None:
    answer = await ask(FailingHost(FULL), stream=is_stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json() == {"error": "128 requests wait"}


async def test_a_whole_answer_is_sent_only_if_it_is_whole() -> None:
    answer = await ask(FailingHost(GONE, count=2), stream=False)
    assert answer.status_code == 503
    assert answer.json() == {"error": "the model's runner is gone"}
