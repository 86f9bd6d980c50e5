"""Constraints of a completion: what its text must be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner_client.checks import check_text, check_texts
from runner_client.types.schemas import schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON value that is valid by a JSON schema. Properties come in the order of the schema.

    Raises:
        TypeError: The schema is of a wrong type, has values that JSON lacks, or is a type that has
            no JSON schema.
        NotSupportedError: The schema is a type, and Pydantic is not installed.
    """

    schema: Mapping[str, object] | str | type[Any]
    """The schema, as a mapping or as JSON text, or the type that has it: a Pydantic model, a
    dataclass, or one made of these, such as ``list[Person]``. Types need the extra ``pydantic``,
    and ``Completion.parse`` returns their values."""
    text: str = field(init=False, repr=False, compare=False)
    """The schema as JSON text."""

    def __post_init__(self) -> None:
        schema = self.schema
        text = schema if isinstance(schema, str) else json.dumps(schema_of("schema", schema))
        object.__setattr__(self, "text", text)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that matches a regular expression as a whole.

    Raises:
        TypeError: The expression is not a text.
    """

    pattern: str
    """The expression, in the syntax of Rust's ``regex``: no look-around, no back references."""

    def __post_init__(self) -> None:
        check_text("pattern", self.pattern)


@dataclass(frozen=True, slots=True)
class LarkGrammar:
    """A text of a context-free grammar.

    Raises:
        TypeError: The grammar is not a text.
    """

    grammar: str
    """The grammar, in llguidance's variant of Lark's syntax, beginning at the rule ``start``."""

    def __post_init__(self) -> None:
        check_text("grammar", self.grammar)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several texts.

    Raises:
        TypeError: The texts are not a sequence of strings.
    """

    texts: Sequence[str]
    """The texts: 1 to 1,024, none of them empty."""

    def __post_init__(self) -> None:
        check_texts("texts", self.texts)


Constraint = JsonSchema | JsonObject | Regex | LarkGrammar | Choice
"""What the text of a completion must be; the server checks it."""
