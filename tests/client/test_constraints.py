"""Constraints in the client: typed arguments, and the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import (
    AsyncRunnerClient,
    Choice,
    InvalidRequestError,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Regex,
    RunnerClient,
)
from runner_client.cli.shared.output import completion_rows
from runner_client.cli.status import status_rows
from runner_client.testing import Failure, FakeRunner, fake_runner
from runner_client.types import Completion, Constraint, DoneReason
from runner_common.contract import CONSTRAINT_KINDS
from support.command_line import invoke

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"enum": ["é", None, 1.5]}}}
MESSAGES: list[tuple[Constraint, pb.Constraint]] = [
    (JsonSchema(SCHEMA), pb.Constraint(json_schema=json.dumps(SCHEMA))),
    (JsonSchema('{"type": "null"}'), pb.Constraint(json_schema='{"type": "null"}')),
    (JsonObject(), pb.Constraint(json_object=pb.JsonObject())),
    (Regex("[a-z]+"), pb.Constraint(regex="[a-z]+")),
    (LarkGrammar('start: "a"'), pb.Constraint(lark='start: "a"')),
    (Choice(("yes", "no")), pb.Constraint(choice=pb.Choice(texts=["yes", "no"]))),
]
BAD: list[tuple[type, Any]] = [
    (JsonSchema, 3),
    (JsonSchema, b"{}"),
    (JsonSchema, {"enum": [{1, 2}]}),
    (Regex, 3),
    (LarkGrammar, b"start:"),
    (Choice, "yes"),
    (Choice, (1, 2)),
]


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    with fake_runner() as runner:
        yield runner


def sent(fake: FakeRunner) -> pb.Constraint:
    (request,) = fake.requests
    assert isinstance(request, pb.CompletionRequest)
    return request.constraint


@pytest.mark.parametrize(("constraint", "message"), MESSAGES, ids=lambda each: type(each).__name__)
def test_a_constraint_is_sent(
    fake: FakeRunner, constraint: Constraint, message: pb.Constraint
) -> None:
    with RunnerClient(fake.address) as client:
        assert client.complete("Hi", constraint=constraint).constraint_satisfied is True
    assert sent(fake) == message


async def test_the_asyncio_client_sends_it_too(fake: FakeRunner) -> None:
    async with AsyncRunnerClient(fake.address) as client:
        chunks = [chunk async for chunk in client.completion("Hi", constraint=Regex("a"))]
    assert chunks[-1].constraint_satisfied is True
    assert chunks[0].constraint_satisfied is None
    assert sent(fake).regex == "a"


def test_without_a_constraint_none_is_sent(fake: FakeRunner) -> None:
    with RunnerClient(fake.address) as client:
        assert client.complete("Hi").constraint_satisfied is None
    (request,) = fake.requests
    assert isinstance(request, pb.CompletionRequest)
    assert not request.HasField("constraint")


@pytest.mark.parametrize(("kind", "value"), BAD, ids=str)
def test_a_value_of_the_wrong_type_is_refused(kind: Any, value: object) -> None:
    with pytest.raises(TypeError):
        kind(value)


def test_something_else_is_not_a_constraint(fake: FakeRunner) -> None:
    with RunnerClient(fake.address) as client:
        with pytest.raises(TypeError, match="constraint is a JsonSchema"):
            client.complete("Hi", constraint={"type": "object"})  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError):
            client.complete("Hi", constraint=Regex("\ud800"))


def test_the_kinds_are_told(fake: FakeRunner) -> None:
    with RunnerClient(fake.address) as client:
        status = client.status()
    assert status.model
    assert status.model.capabilities.constraint_kinds == CONSTRAINT_KINDS
    assert "with constraints" in dict(status_rows(status))["requests"]


def test_run_reads_a_schema_from_a_file(fake: FakeRunner, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "string", "const": "é"}', encoding="utf-8")
    result = invoke("run", "--address", fake.address, "--json-schema", str(file), "Hi")
    assert result.exit_code == 0
    assert sent(fake).json_schema == file.read_text(encoding="utf-8")


def test_run_names_its_option_when_a_schema_is_refused(fake: FakeRunner, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"uniqueItems": true}')
    place = ("constraint.json_schema", "at #: not supported: uniqueItems")
    fake.failure = Failure("INVALID_FIELD", ": ".join(place), field_violations=[place])
    result = invoke("run", "--address", fake.address, "--json-schema", str(file), "Hi")
    assert result.exit_code == 2
    assert result.stderr == "error: --json-schema: at #: not supported: uniqueItems\n"


@pytest.mark.parametrize(
    "content", [None, b"\xff", b"{", b"[" * 10**5], ids=["missing", "bytes", "cut", "deep"]
)
def test_run_refuses_a_file_that_is_not_json(
    fake: FakeRunner, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    result = invoke("run", "--address", fake.address, "--json-schema", str(file), "Hi")
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert not fake.requests


@pytest.mark.parametrize("satisfied", [True, False, None])
def test_run_says_if_the_text_is_unfinished(satisfied: bool | None) -> None:
    done = Completion(
        "{",
        (1,),
        (),
        DoneReason.LENGTH,
        None,
        1,
        0.1,
        1,
        0.1,
        0.0,
        constraint_satisfied=satisfied,
    )
    shown = dict(completion_rows(done))["generated"]
    assert ("before the text" in shown) == (satisfied is False)
