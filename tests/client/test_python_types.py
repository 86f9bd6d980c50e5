"""Schemas from Python types, and values of these types from texts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, assert_type

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from typing_extensions import TypedDict

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import ChatMessage, JsonSchema, RunnerClient, Tool, ToolCall
from runner_client.testing import fake_runner
from runner_client.types import ChatCompletion, Completion, DoneReason

ROOT = Path(__file__).parents[2]


class Person(BaseModel):
    """A model that holds others of its kind."""

    name: str
    age: int = Field(default=0, ge=0)
    friends: list[Person] = []


@dataclass
class Place:
    """A dataclass of the standard library."""

    town: str
    ways: list[Literal["bus", "train"]] = field(default_factory=list)


class Point(TypedDict):
    """A dictionary with named keys."""

    x: int


class Open(BaseModel):
    """A model that keeps properties without a field."""

    model_config = ConfigDict(extra="allow")
    x: int


class Named(BaseModel):
    """A model whose JSON has its own names, although it has an alias."""

    model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
    number: int = Field(default=1, alias="nr")


@dataclass
class Unfinished:
    """A dataclass with an annotation that does not exist."""

    part: Missing  # type: ignore[name-defined]  # noqa: F821


VALUES: list[tuple[type[Any], object, str]] = [
    (Person, Person(name="Ada", age=36), '{"name": "Ada", "age": 36}'),
    (Place, Place("Ulm", ["bus"]), '{"town": "Ulm", "ways": ["bus"]}'),
    (list[Place], [Place("Ulm")], '[{"town": "Ulm"}]'),
    (RootModel[dict[str, int]], RootModel[dict[str, int]]({"a": 1}), '{"a": 1}'),
    (Point, {"x": 1}, '{"x": 1}'),
    (int, 12, "12"),
]


def done(text: str, **changes: Any) -> Completion:
    """Return a finished completion whose constraint is satisfied."""
    whole = Completion(
        text, (1,), (), DoneReason.STOP, None, 1, 0.1, 7, 0.1, 0.0, constraint_satisfied=True
    )
    return replace(whole, **changes)


def schema_of(kind: type[Any]) -> Any:
    return json.loads(JsonSchema(kind).text)


@pytest.mark.parametrize(("kind", "value", "text"), VALUES, ids=lambda each: str(each)[:40])
def test_a_type_gives_its_schema_and_its_value(kind: type[Any], value: object, text: str) -> None:
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(text), schema)
    assert done(text).parse(kind) == value


def test_a_property_named_by_the_schema_is_read() -> None:
    # By its alias until Pydantic 2.13, although the model would drop that silently.
    (name,) = schema_of(Named)["properties"]
    assert done(json.dumps({name: 3})).parse(Named).number == 3


def test_the_value_has_the_type() -> None:
    assert_type(done('{"name": "Ada"}').parse(Person), Person)
    assert_type(ToolCall("f", '{"town": "Ulm"}').parse(Place), Place)


@pytest.mark.parametrize("kind", [Person, Place, Point, Named], ids=lambda kind: kind.__name__)
def test_what_pydantic_would_drop_is_not_allowed(kind: type[Any]) -> None:
    schema = schema_of(kind)
    parts = [schema, *schema.get("$defs", {}).values()]
    assert [part["additionalProperties"] for part in parts if "properties" in part] == [False]


def test_a_class_that_takes_more_properties_still_does() -> None:
    schema = schema_of(Open)
    assert schema["additionalProperties"] is True
    assert done('{"x": 1, "y": 2}').parse(Open).model_extra == {"y": 2}


def test_a_decimal_is_a_number() -> None:
    class Price(BaseModel):
        euros: Decimal = Field(ge=0)

    assert schema_of(Price)["properties"]["euros"] == {
        "minimum": 0,
        "title": "Euros",
        "type": "number",
    }
    assert done('{"euros": 1.10}').parse(Price).euros == Decimal("1.1")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (Place("Ulm"), "schema is a mapping with a JSON schema, or a type"),
        (len, "schema is a mapping with a JSON schema, or a type"),
        (RunnerClient, "RunnerClient is not a type for Pydantic: Unable to"),
        (Unfinished, "Unfinished is not a type for Pydantic: name 'Missing' is not defined"),
        (Callable[[], int], "has no JSON schema: Cannot generate"),
    ],
)
def test_what_has_no_schema_is_refused(source: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        JsonSchema(source)
    with pytest.raises(TypeError, match=problem.replace("schema is", "parameters is")):
        Tool("f", "", source)


def test_a_text_that_breaks_a_rule_of_the_class_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        done('{"name": "Ada", "age": -1}').parse(Person)


@pytest.mark.parametrize(
    ("text", "changes", "advice"),
    [
        ('{"name": "A', {"constraint_satisfied": False}, "raise num_predict"),
        ('{"name": "Ada"}', {"constraint_satisfied": False}, "raise num_predict"),
        ('{"na', {"constraint_satisfied": False, "stop_match": "m"}, "the stop string 'm'"),
        # The beginning of 123 is a number, too.
        ("12", {"done_reason": DoneReason.LENGTH}, "raise num_predict"),
        ("12", {"done_reason": DoneReason.LENGTH, "constraint_satisfied": None}, "num_predict"),
        ("12", {"stop_match": "3"}, "the stop string '3'"),
    ],
)
def test_an_unfinished_text_is_refused(text: str, changes: dict[str, Any], advice: str) -> None:
    kind = int if text.isdigit() else Person
    with pytest.raises(ValueError, match=f"unfinished after 7 tokens .*{advice}"):
        done(text, **changes).parse(kind)


def test_a_text_that_is_whole_without_its_end_token_is_a_value() -> None:
    whole = done('{"name": "Ada"}', done_reason=DoneReason.LENGTH)
    assert whole.parse(Person) == Person(name="Ada")
    assert replace(whole, constraint_satisfied=None).parse(Person) == Person(name="Ada")


def test_answers_of_conversations_are_values_too() -> None:
    answer = ChatCompletion('{"name": "Ada"}', (1,), (), DoneReason.STOP, None, 1, 0.1, 7, 0.1, 0.0)
    assert answer.parse(Person) == Person(name="Ada")


def test_types_are_sent_as_schemas() -> None:
    with fake_runner() as fake, RunnerClient(fake.address) as client:
        client.complete("Hi", constraint=JsonSchema(Person))
        client.complete_chat([ChatMessage("user", "Hi")], tools=[Tool("go", "", Place)])
        completion, chat = fake.requests
    assert isinstance(completion, pb.CompletionRequest)
    assert json.loads(completion.constraint.json_schema) == schema_of(Person)
    assert isinstance(chat, pb.ChatRequest)
    assert json.loads(chat.tools[0].parameters) == schema_of(Place)


WITHOUT_PYDANTIC = """
import sys

sys.modules["pydantic"] = None
from dataclasses import dataclass
from runner_client import JsonSchema, NotSupportedError, Tool, ToolCall

@dataclass
class Place:
    town: str

assert JsonSchema({"type": "object"}).text == '{"type": "object"}'
for use in (JsonSchema, lambda kind: Tool("f", "", kind), ToolCall("f").parse):
    try:
        use(Place)
    except NotSupportedError as error:
        print(error)
"""


def test_without_pydantic_a_type_is_refused_and_a_schema_is_not() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYDANTIC],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith("Place as a schema needs Pydantic: install mlx-grpc-runner with the")
