"""Shared parts of both Python clients: scenarios, requests and results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mlxrunner.v1 import runner_pb2 as pb

Json = dict[str, Any]

CALL_SECONDS = 120.0
STATUS_SECONDS = 0.02
UNTIL_STATUS_SECONDS = 20.0


def arguments() -> tuple[list[Json], dict[str, Json]]:
    """Read scenarios and servers from the files named on the command line."""
    scenarios, servers = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    return scenarios, servers


def channel_options(scenario: Json) -> list[tuple[str, int]]:
    """Return the channel options of a scenario."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    if seconds := scenario.get("keepalive_seconds"):
        options += [
            ("grpc.keepalive_time_ms", int(1000 * seconds)),
            # By default gRPC stops after two pings without data.
            ("grpc.http2.max_pings_without_data", 0),
        ]
    return options


def metadata_of(scenario: Json, server: Json) -> tuple[tuple[str, str], ...]:
    """Return the metadata for every call of a scenario."""
    token = scenario.get("token", server.get("token"))
    return (("authorization", f"Bearer {token}"),) if token else ()


def request_of(step: Json) -> Any:
    """Return the request of a step as a message."""
    request: Message = getattr(pb, f"{step['rpc']}Request")()
    return json_format.ParseDict(_with_repeats(step["request"]), request)


def _with_repeats(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_repeats(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$repeat" in value:
        return value["$repeat"] * value["count"]
    return {key: _with_repeats(each) for key, each in value.items()}


def has_fields(status: Message, fields: Json) -> bool:
    """Return whether a status has these values."""
    return all(getattr(status, name) == value for name, value in fields.items())


def plain(messages: list[Any]) -> list[Json]:
    """Convert messages to JSON objects."""
    return [json_format.MessageToDict(each, preserving_proto_field_name=True) for each in messages]


def success(messages: list[Any]) -> Json:
    """Return the result of a successful call."""
    return {"code": "OK", "messages": plain(messages)}


def failure(error: Any, messages: list[Any]) -> Json:
    """Return the result of a failed call, with the messages received before."""
    result = {
        "code": error.code().name,
        "message": error.details() or "",
        "messages": plain(messages),
    }
    if details := _details(error):
        result["details"] = details
    return result


def _details(error: grpc.Call) -> Json:
    status = rpc_status.from_call(error)
    found: Json = {}
    for detail in status.details if status else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            found |= {"reason": info.reason, "domain": info.domain, "metadata": dict(info.metadata)}
        elif detail.Unpack(bad):
            found["violations"] = [
                {"field": each.field, "description": each.description}
                for each in bad.field_violations
            ]
        elif detail.Unpack(retry):
            found["retry_seconds"] = retry.retry_delay.ToTimedelta().total_seconds()
    return found


def print_results(scenario: Json, results: list[Json]) -> None:
    """Print the line of a scenario."""
    print(json.dumps({"scenario": scenario["name"], "results": results}), flush=True)  # noqa: T201 - the client's output


def broken(error: Exception) -> Json:
    """Return the result of a step that failed in the client itself."""
    return {"broken": f"{type(error).__name__}: {error}"}
