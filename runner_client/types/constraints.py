"""Constraints of a completion: what its text must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_client.checks import check_text, check_texts, refuse_type

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON value that is valid by a JSON schema. Properties come in the order of the schema.

    Raises:
        TypeError: The schema is neither a mapping nor a text, or has values that JSON lacks.
    """

    schema: Mapping[str, object] | str
    """The schema, as a mapping or as JSON text."""

    def __post_init__(self) -> None:
        if not isinstance(self.schema, Mapping | str):
            refuse_type("schema", self.schema, "a JSON schema, as a mapping or as JSON text")
        if not isinstance(self.schema, str):
            json.dumps(self.schema)

    @property
    def text(self) -> str:
        """The schema as JSON text."""
        return self.schema if isinstance(self.schema, str) else json.dumps(self.schema)


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
