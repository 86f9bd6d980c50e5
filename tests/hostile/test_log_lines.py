"""Text of a caller stays in one log line and has no control characters for a terminal."""

from __future__ import annotations

import logging

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.errors import ModelNotFound
from support.harness import Server, eventually, failure

FORGED = "x\r\n2026-01-01 00:00:00,000 ERROR runner_server: all is lost\x1b[2J\x07\u2028\u202e"


def _assert_plain(lines: list[str]) -> None:
    assert lines
    for line in lines:
        assert line.isprintable(), line


@pytest.mark.parametrize("error", [ModelNotFound("nothing there", model="x"), ValueError("broken")])
async def test_the_name_of_a_model_cannot_forge_a_line(
    server: Server, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.DEBUG, "runner_server")
    server.backend.load_error = error
    await failure(server.load(FORGED))
    _assert_plain([record.getMessage() for record in caplog.records])


async def test_a_request_id_cannot_forge_a_line(
    loaded: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "runner_server")
    options = pb.CompletionOptions(num_predict=2)
    request = pb.CompletionRequest(prompt=FORGED, request_id=FORGED, options=options)
    assert [message async for message in loaded.stub.Completion(request)][-1].done
    # The line follows the last message.
    await eventually(lambda: bool(caplog.records))
    _assert_plain([record.getMessage() for record in caplog.records])
