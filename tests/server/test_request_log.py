"""One log line for every request, however it ends, without any text of the request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.serving.log import JsonFormatter
from runner_server.telemetry import request_log
from runner_server.telemetry.call_record import CallRecord
from runner_server.telemetry.request_log import RequestLine, RequestLog
from support.fakes import FakeBackend, says
from support.harness import CompletionCall, Server, StartServer, eventually, failure

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"

Lines = Callable[[], list[RequestLine]]
Fields = dict[str, str | int | float]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Return a function for the logged lines, except of Load and Status."""
    caplog.set_level(logging.DEBUG, request_log.__name__)

    def get() -> list[RequestLine]:
        found = [record.msg for record in caplog.records if isinstance(record.msg, RequestLine)]
        return [line for line in found if line.fields["method"] not in ("Load", "Status")]

    return get


async def _read(call: CompletionCall) -> list[pb.CompletionResponse]:
    return [message async for message in call]


async def _id_sent_back(call: grpc.aio.Call) -> str:
    # Not ``dict``: in older gRPC the metadata is a mapping whose iterator gives pairs.
    (found,) = [text for name, text in await call.trailing_metadata() if name == "x-request-id"]
    return str(found)


async def only_line(lines: Lines) -> Fields:
    """Return the fields of the only line, which the server writes a moment after the answer."""
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    return line.fields


async def test_the_line_of_a_completion_has_counts_and_durations(
    loaded: Server, lines: Lines
) -> None:
    request = pb.CompletionRequest(
        prompt="hello", options=pb.CompletionOptions(num_predict=3), request_id="mine"
    )
    async for _ in loaded.stub.Completion(request):
        pass
    fields = await only_line(lines)
    durations = {name: fields.pop(name) for name in list(fields) if name.endswith("_seconds")}
    id_ = fields.pop("id")
    assert isinstance(id_, str)
    assert len(id_) == 16
    assert fields == {
        "request_id": "mine",
        "method": "Completion",
        "model": "fake",
        "code": "OK",
        "finish_reason": "length",
        "prompt_tokens": 6,
        "cached_tokens": 0,
        "generated_tokens": 3,
    }
    assert set(durations) == {
        "duration_seconds", "queue_seconds", "prefill_seconds", "generation_seconds",
    }  # fmt: skip
    parts = [float(value) for name, value in durations.items() if name != "duration_seconds"]
    assert 0 <= sum(parts) <= float(durations["duration_seconds"]) + 1e-4


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.CompletionRequest(prompt=""), "INVALID_FIELD"),
        (pb.CompletionRequest(prompt="x" * 9999), "PROMPT_TOO_LONG"),
        (pb.CompletionRequest(prompt="x", request_id="r" * 9999), "INVALID_FIELD"),
    ],
)
async def test_a_refused_request_has_its_line(
    loaded: Server, lines: Lines, request_: pb.CompletionRequest, reason: str
) -> None:
    assert (await failure(loaded.stub.Completion(request_))).reason == reason
    fields = await only_line(lines)
    assert (fields["code"], fields["reason"]) == ("INVALID_ARGUMENT", reason)
    assert "prompt_tokens" not in fields
    assert len(str(fields.get("request_id", ""))) <= 256


async def test_a_failed_request_has_its_line(loaded: Server, lines: Lines) -> None:
    loaded.backend.failures.append(RuntimeError("broken"))
    assert (await failure(loaded.start())).reason == "GENERATION_FAILED"
    fields = await only_line(lines)
    assert (fields["code"], fields["reason"]) == ("INTERNAL", "GENERATION_FAILED")
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (6, 0)
    assert "finish_reason" not in fields


async def test_the_line_of_a_cancelled_request_has_its_counts(loaded: Server, lines: Lines) -> None:
    loaded.backend.step_gate.shut()
    loaded.backend.step_gate.allow(3)
    call = loaded.start()
    async for message in call:
        if message.token_ids:
            break
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    call.cancel()
    fields = await only_line(lines)
    assert (fields["code"], fields["generated_tokens"]) == ("CANCELLED", 2)
    assert "reason" not in fields


async def test_the_line_of_a_request_that_only_waited_has_no_prefill(
    loaded: Server, lines: Lines
) -> None:
    loaded.backend.step_gate.shut()
    calls = [loaded.start(str(i)) for i in range(4)]
    await eventually(lambda: loaded.view.request_count == 4)
    began = time.monotonic()
    call = loaded.start(timeout=1.0)
    await eventually(lambda: loaded.view.request_count == 5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(call))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    fields = await only_line(lines)
    assert fields["code"] == "DEADLINE_EXCEEDED"
    assert 0 < float(fields["queue_seconds"]) < time.monotonic() - began
    assert "prefill_seconds" not in fields
    for each in calls:
        each.cancel()


async def test_every_request_has_exactly_one_line(loaded: Server, lines: Lines) -> None:
    count = 60
    calls = [loaded.start(str(i), num_predict=1 + i % 5) for i in range(count)]
    for call in calls[::3]:
        call.cancel()
    rest = [call for index, call in enumerate(calls) if index % 3]
    for messages in await asyncio.gather(*(_read(call) for call in rest)):
        assert messages[-1].done
    await eventually(lambda: len(lines()) >= count - count // 3)
    await loaded.settled()
    await loaded.stub.Tokenize(pb.TokenizeRequest(content="x"))
    await eventually(lambda: lines()[-1].fields["method"] == "Tokenize")
    completions = [line.fields for line in lines() if line.fields["method"] == "Completion"]
    assert len({fields["id"] for fields in completions}) == len(completions)
    # A request cancelled before the server saw it has no line.
    assert count - count // 3 <= len(completions) <= count
    assert {fields["code"] for fields in completions} <= {"OK", "CANCELLED"}


async def test_a_call_without_the_token_has_its_line(
    start_server: StartServer, lines: Lines
) -> None:
    server = await start_server(token="x" * 32)
    problem = await failure(server.stub.Unload(pb.UnloadRequest()))
    assert problem.reason == "UNAUTHENTICATED"
    fields = await only_line(lines)
    assert (fields["method"], fields["code"]) == ("Unload", "UNAUTHENTICATED")
    assert fields["reason"] == "UNAUTHENTICATED"


async def test_an_unknown_method_has_no_line(loaded: Server, lines: Lines) -> None:
    call: Any = loaded.channel.unary_unary("/mlxrunner.v1.RunnerService/Invented")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"")
    assert not lines()


async def test_status_is_logged_at_debug_unless_it_fails(
    loaded: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, request_log.__name__)
    await loaded.status()

    def levels() -> dict[str, str]:
        return {str(record.msg).split()[0]: record.levelname for record in caplog.records}

    await eventually(lambda: "Status" in levels())
    assert levels()["Status"] == "DEBUG"
    # A failed one is logged at INFO.
    RequestLog().log(CallRecord("Status", "id").end("UNAUTHENTICATED"))
    assert levels()["Status"] == "INFO"


@pytest.mark.parametrize("bad", [False, True])
async def test_the_callers_id_is_sent_back(loaded: Server, lines: Lines, *, bad: bool) -> None:
    prompt = "" if bad else "x"
    request = pb.CompletionRequest(prompt=prompt, options=pb.CompletionOptions(num_predict=1))
    call = loaded.stub.Completion(request, metadata=(("x-request-id", "abc/1"),))
    if bad:
        assert (await failure(call)).reason == "INVALID_FIELD"
    else:
        assert [message async for message in call][-1].done
    assert await _id_sent_back(call) == "abc/1"
    assert (await only_line(lines))["id"] == "abc/1"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\tb"])
async def test_a_bad_id_is_replaced(loaded: Server, given: str) -> None:
    assert CallRecord.arrived("Status", (("x-request-id", given),)).id != given
    call = loaded.stub.Status(pb.StatusRequest())
    assert len(await _id_sent_back(call)) == 16


async def test_the_trace_of_the_caller_is_in_the_line(loaded: Server, lines: Lines) -> None:
    request = pb.TokenizeRequest(content="x")
    await loaded.stub.Tokenize(request, metadata=(("traceparent", TRACEPARENT),))
    fields = await only_line(lines)
    assert (fields["trace_id"], fields["parent_id"]) == (TRACE_ID, PARENT_ID)


@pytest.mark.parametrize(
    "given",
    [
        "",
        TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"{TRACEPARENT}-more",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-01\n",
        b"\xff",
    ],
)
def test_an_invalid_trace_is_ignored(given: str | bytes) -> None:
    request = CallRecord.arrived("Status", (("traceparent", given),))
    assert (request.trace_id, request.parent_id) == ("", "")


def test_a_trace_of_a_later_version_is_accepted() -> None:
    request = CallRecord.arrived("Status", (("traceparent", f"01{TRACEPARENT[2:]}-more"),))
    assert request.trace_id == TRACE_ID


async def test_no_text_of_a_request_is_logged(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start_server(FakeBackend(reply=says("the-secret-answer STOPHERE and more")))
    await server.load()
    assert await server.text("the-secret-question", stop=["STOPHERE"]) == "the-secret-answer "
    await failure(server.start("the-secret-question", temperature=-1))
    await server.stub.Tokenize(pb.TokenizeRequest(content="the-secret-question"))
    await eventually(lambda: "Tokenize" in caplog.text)
    shown = [JsonFormatter().format(record) for record in caplog.records]
    for text in (caplog.text, "\n".join(shown)):
        assert "secret" not in text
        assert "STOPHERE" not in text


def test_a_value_cannot_forge_a_line() -> None:
    call = CallRecord("Completion", "id", request_id='a\nINFO "x"=\x1b[2J\u2028', model="a b")
    text = str(RequestLine(call.end("OK")))
    assert "\n" not in text
    assert "\x1b" not in text
    assert text.isascii()
    assert r'request_id="a\nINFO \"x\"=\u001b[2J\u2028"' in text
    assert 'model="a b"' in text


def test_json_lines_have_one_object_each() -> None:
    line = RequestLine(CallRecord("Tokenize", "id").end("OK"))
    record = logging.LogRecord("a", logging.INFO, "", 0, line, None, None)
    entry = json.loads(JsonFormatter().format(record))
    assert entry["message"].startswith("Tokenize OK in 0.")
    assert entry["time"].endswith("+00:00")
    assert (entry["level"], entry["method"], entry["id"]) == ("INFO", "Tokenize", "id")
    assert isinstance(entry["duration_seconds"], float)
    bad = ValueError("two\nlines")
    error = logging.LogRecord("b", logging.ERROR, "", 0, "%s", ("bad",), (ValueError, bad, None))
    shown = JsonFormatter().format(error)
    assert "\n" not in shown
    assert "ValueError: two\nlines" in json.loads(shown)["exception"]


def test_a_disabled_level_formats_no_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_log.logger, "isEnabledFor", lambda _level: False)
    monkeypatch.setattr(request_log, "RequestLine", None)
    RequestLog().log(CallRecord("Completion", "id").end("OK"))
