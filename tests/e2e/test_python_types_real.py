"""Texts that a real server writes by schemas of Python types, judged by Pydantic."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel

from runner_client import InvalidRequestError, JsonSchema, Options, RunnerProcess
from runner_client.cli.demo import demo_model

if importlib.util.find_spec("mlx") is None:
    pytest.skip("mlx is not installed (the server extra)", allow_module_level=True)
pytestmark = pytest.mark.mlx

TRIES = 2
NUM_PREDICT = 600

Short = Annotated[str, Field(max_length=6)]


class Color(Enum):
    """A choice of texts."""

    RED = "red"
    BLUE = "dark blue"


class Level(IntEnum):
    """A choice of numbers."""

    LOW = 1
    HIGH = 2


class Address(BaseModel):
    """A part of a person, with a pattern and an optional field."""

    street: Short
    code: str = Field(pattern=r"^\d{5}$")
    note: Short | None = None


class Person(BaseModel):
    """A model with models, choices and ranges."""

    name: Short = Field(description="First name", min_length=2)
    age: int = Field(ge=0, lt=130)
    height: float | None = Field(gt=0.5, le=2.5)
    color: Color
    level: Level
    addresses: list[Address] = Field(default_factory=list, max_length=2)
    pair: tuple[bool, Literal["a", 1] | None]


class Item(BaseModel):
    """Texts in forms of their own, and names that are not those of the fields."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    item_id: UUID = Field(alias="itemId")
    day: date
    price: Decimal = Field(ge=0, le=1000)
    host: IPv4Address
    counts: dict[str, int] = Field(max_length=2)


class Node(BaseModel):
    """A tree."""

    value: Literal[1, 2]
    children: list[Node] = Field(default_factory=list, max_length=2)


class Circle(BaseModel):
    """One kind of shape."""

    kind: Literal["circle"]
    radius: int = Field(ge=0, le=9)


class Square(BaseModel):
    """Another kind of shape."""

    kind: Literal["square"]
    side: int = Field(ge=0, le=9)


class Drawing(BaseModel):
    """Shapes told apart by their kind."""

    shapes: list[Annotated[Circle | Square, Field(discriminator="kind")]] = Field(max_length=3)
    first: Circle | Square


@dataclass
class Answer:
    """A dataclass of the standard library with another and a model."""

    text: Short
    shape: Circle
    ways: list[Literal["bus", "train"]] = field(default_factory=list)
    next: Answer | None = None


class Tags(BaseModel):
    """A schema that the server refuses."""

    tags: set[str]


KINDS: list[Any] = [Person, Item, Node, Drawing, Answer, list[Circle], RootModel[dict[str, Level]]]


@pytest.fixture(scope="module")
def runner() -> Iterator[RunnerProcess]:
    with RunnerProcess(str(demo_model()), parallel=TRIES) as process:
        yield process


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", str(kind)))
def test_every_whole_text_is_a_value(runner: RunnerProcess, kind: Any) -> None:
    constraint = JsonSchema(kind)

    def is_value(seed: int) -> bool:
        options = Options(seed=seed, num_predict=NUM_PREDICT, temperature=1.0)
        done = runner.complete("data = ", options=options, constraint=constraint)
        if not done.constraint_satisfied:
            with pytest.raises(ValueError, match="unfinished"):
                done.parse(kind)
            return False
        value = done.parse(kind)
        expected = list if kind == list[Circle] else kind
        assert isinstance(value, expected)
        return True

    with ThreadPoolExecutor(TRIES) as pool:
        assert any([*pool.map(is_value, range(TRIES))])


def test_a_type_beyond_the_server_is_refused_with_its_place(runner: RunnerProcess) -> None:
    with pytest.raises(InvalidRequestError, match=r"at #/properties/tags: .*uniqueItems"):
        runner.complete("data = ", constraint=JsonSchema(Tags))
