"""Fields of a newer protocol are refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, InvalidRequestError
from runner_client.rpc.messages import requests
from runner_common.contract import SERVICE_NAME
from runner_common.serving.unknown_fields import read_known
from runner_server import __version__
from support.harness import Problem, Server, failure
from support.hostile_requests import METHODS, encode_field, encode_varint

NEW = 97
VARINT, BYTES, FIXED32 = 0, 2, 5
UNKNOWN = encode_field(NEW, VARINT, encode_varint(1))
COMPLETION = pb.CompletionRequest(
    prompt="x", options=pb.CompletionOptions(num_predict=1)
).SerializeToString()


def _message_paths(descriptor: Descriptor, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[str]:
    """Yield the paths of all messages in a request; the request's path is empty."""
    yield ".".join(field.name for field in path)
    for field in descriptor.fields:
        if field.message_type and not field.message_type.GetOptions().map_entry:
            yield from _message_paths(field.message_type, (*path, field))


def _request_with(descriptor: Descriptor, path: str, data: bytes) -> bytes:
    """Return a request holding ``data`` in the message at a path."""
    first, _, rest = path.partition(".")
    if not first:
        return data
    field = descriptor.fields_by_name[first]
    assert field.message_type
    return encode_field(field.number, BYTES, _request_with(field.message_type, rest, data))


async def refusal_of(server: Server, method: str, data: bytes) -> Problem:
    make = server.channel.unary_stream if method == "Completion" else server.channel.unary_unary
    return await failure(make(f"/{SERVICE_NAME}/{method}")(data))  # type: ignore[arg-type]


PATHS = [
    (method.name, path, _request_with(method.input_type, path, UNKNOWN))
    for method in METHODS
    for path in _message_paths(method.input_type)
]


def test_the_cases_include_nested_messages() -> None:
    paths = {path for name, path, _ in PATHS if name == "Completion"}
    constraint = {"constraint", "constraint.json_object", "constraint.choice"}
    assert paths == {"", "options", "prompt_token_ids", *constraint}


@pytest.mark.parametrize(("method", "path", "data"), PATHS)
async def test_an_unknown_field_is_refused_in_every_message(
    loaded: Server, method: str, path: str, data: bytes
) -> None:
    problem = await refusal_of(loaded, method, data)
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert problem.violations.keys() == {path or "request"}
    (text,) = problem.violations.values()
    assert f"field {NEW} of " in text
    assert __version__ in text
    assert text.endswith("leave it out")
    assert text in problem.message


async def test_a_refused_request_has_no_effect(loaded: Server) -> None:
    await refusal_of(loaded, "Unload", UNKNOWN)
    await refusal_of(loaded, "Completion", COMPLETION + UNKNOWN)
    assert (await loaded.status()).state == pb.STATE_ACTIVE
    assert loaded.backend.steps == 0


async def test_several_unknown_fields_are_each_named_once(loaded: Server) -> None:
    data = (UNKNOWN + encode_field(98, FIXED32, bytes(4))) * 1000
    options = encode_field(3, BYTES, encode_field(500, BYTES, b"text"))
    problem = await refusal_of(loaded, "Completion", COMPLETION + options + data)
    assert [f"field {number} of " in problem.message for number in (97, 98, 500)] == [True] * 3
    assert problem.message.count("is unknown") == 3


@pytest.mark.parametrize(
    ("data", "field", "name"),
    [
        (encode_field(4, BYTES, b"\x05"), "request", "logprobs"),
        (
            encode_field(3, BYTES, encode_field(1, VARINT, encode_varint(1))),
            "options",
            "temperature",
        ),
        # An entry of a map.
        (
            encode_field(
                3, BYTES, encode_field(12, BYTES, encode_field(1, VARINT, b"\5") + UNKNOWN)
            ),
            "options",
            "bias",
        ),
    ],
    ids=["number as bytes", "float as integer", "map entry"],
)
async def test_a_known_field_with_another_wire_type_is_refused(
    loaded: Server, data: bytes, field: str, name: str
) -> None:
    """Send a wire type protobuf does not expect and so files under unknown fields."""
    problem = await refusal_of(loaded, "Completion", COMPLETION + data)
    assert problem.violations.keys() == {field}
    assert name in problem.message
    assert "another wire type" in problem.message


@pytest.mark.parametrize("method", ["Load", "Estimate"])
async def test_an_unknown_enum_value_is_refused(server: Server, method: str) -> None:
    data = pb.LoadRequest(model="x").SerializeToString() + encode_field(
        4, VARINT, encode_varint(NEW)
    )
    problem = await refusal_of(server, method, data)
    assert problem.reason == "INVALID_FIELD"
    assert problem.violations.keys() == {"dtype"}
    assert str(NEW) in problem.violations["dtype"]


def test_every_enum_of_a_request_is_checked() -> None:
    enums = {
        f"{method.name}.{field.name}"
        for method in METHODS
        for field in method.input_type.fields
        if field.enum_type
    }
    # `ChatMessage.role`, which is inside a message, has a test of its own.
    assert enums == {"Load.dtype", "Estimate.dtype", "Chat.tool_choice"}


async def test_an_unknown_field_after_a_long_prompt_is_named(loaded: Server) -> None:
    data = pb.CompletionRequest(prompt="x" * 300_000).SerializeToString()
    problem = await refusal_of(loaded, "Completion", data + UNKNOWN)
    assert problem.violations.keys() == {"request"}
    assert f"field {NEW} of CompletionRequest" in problem.message
    # Without the unknown field the prompt is read, and found too long.
    assert (await refusal_of(loaded, "Completion", data)).reason == "PROMPT_TOO_LONG"


async def test_megabytes_of_unknown_fields_are_not_listed(loaded: Server) -> None:
    """Report only the size: listing every field would take seconds and block other callers."""
    problem = await refusal_of(loaded, "Status", UNKNOWN * 1_000_000)
    assert problem.violations == {
        "request": f"3000000 of its bytes are in fields unknown to mlx-grpc-runner {__version__}; "
        "leave them out"
    }


@pytest.mark.parametrize(
    "message",
    [
        pb.CompletionRequest(
            prompt="x" * 200_000, options=pb.CompletionOptions(stop=["y"], logit_bias={1: 2})
        ),
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=range(100_000)), logprobs=0),
        pb.TokenizeRequest(),
    ],
    ids=["text", "ids", "empty"],
)
def test_known_fields_are_read_unchanged(message: Message) -> None:
    read, unknown = read_known(type(message).FromString, message.SerializeToString())
    assert read == message
    assert not unknown


async def test_a_newer_client_gets_the_typed_error(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imitate newer stubs: parse the request from bytes with the new field."""

    def newer(*_args: object, **_kwargs: object) -> pb.CompletionRequest:
        return pb.CompletionRequest.FromString(COMPLETION + UNKNOWN)

    monkeypatch.setattr(requests, "completion_request", newer)
    async with AsyncRunnerClient(loaded.ready.target) as client:
        with pytest.raises(InvalidRequestError, match=f"field {NEW} of CompletionRequest"):
            await client.complete("x")
