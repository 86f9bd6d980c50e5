"""Messages, tools, prompts and answers of conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from runner_client.checks import check_choice, check_kind, check_text, check_texts
from runner_client.types.completions import Completion, CompletionChunk
from runner_client.types.schemas import schema_of, value_of

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

Role = Literal["system", "user", "assistant", "tool", "developer"]
"""The author of a message."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model.

    Raises:
        TypeError: A value is of a wrong type.
    """

    name: str
    """The name of the tool."""
    arguments: str = "{}"
    """The arguments, as the text of a JSON object."""
    id: str = ""
    """The name of the call, for ``ChatMessage.tool_call_id``."""

    def __post_init__(self) -> None:
        for name in ("name", "arguments", "id"):
            check_text(name, getattr(self, name))

    def parse(self, kind: type[T]) -> T:
        """Return the arguments as a value of the type that was the tool's ``parameters``.

        Raises:
            ValueError: The arguments are not such a value; a ``pydantic.ValidationError``.
            TypeError: Pydantic does not know the type.
            NotSupportedError: Pydantic is not installed.
        """
        return value_of(kind, self.arguments)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call.

    Raises:
        TypeError: A value is of a wrong type, or ``parameters`` is a type without a JSON schema.
        NotSupportedError: ``parameters`` is a type, and Pydantic is not installed.
    """

    name: str
    """The name of the tool."""
    description: str = ""
    """What it does and when to use it, for the model."""
    parameters: Mapping[str, object] | type[Any] | None = None
    """The JSON schema of its arguments, or a type that has one, as for ``JsonSchema``. Default: an
    object without properties."""
    schema: Mapping[str, object] = field(init=False, repr=False, compare=False)
    """The JSON schema of the arguments; empty if there is none."""

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_text("description", self.description)
        given = self.parameters
        schema = {} if given is None else schema_of("parameters", given)
        object.__setattr__(self, "schema", schema)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a conversation: ``ChatMessage("user", "Hello")``.

    Raises:
        TypeError: A value is of a wrong type.
        InvalidRequestError: The role is unknown.
    """

    role: Role
    """The author."""
    content: str | tuple[str, ...] | None = None
    """The text, or its parts. Messages of the assistant may have none."""
    reasoning: str = ""
    """The reasoning of an earlier turn of the assistant."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tools that the assistant called."""
    tool_call_id: str = ""
    """The ``ToolCall.id`` that a message of a tool answers."""
    name: str = ""
    """The name of the author, or of the tool."""

    def __post_init__(self) -> None:
        check_choice("role", self.role, get_args(Role))
        if not isinstance(self.content, str):
            check_texts("content", self.content)
        for name in ("reasoning", "tool_call_id", "name"):
            check_text(name, getattr(self, name))
        for call in self.tool_calls:
            check_kind("an item of tool_calls", call, ToolCall)


@dataclass(frozen=True, slots=True)
class ChatChunk(CompletionChunk):
    """Part of a streamed answer. Counts and durations are set in the last chunk only."""

    reasoning: str = ""
    """The next part of the reasoning before the text, whole characters only."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of tools that are complete since the previous chunk."""
    reasoning_eval_count: int = 0
    """The part of ``eval_count`` spent on reasoning."""


@dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """A finished answer: the joined chunks of a stream."""

    reasoning: str = ""
    """The whole reasoning before the text."""
    tool_calls: tuple[ToolCall, ...] = ()
    """All calls of tools; answer each of them with a message of the role ``"tool"``."""
    reasoning_eval_count: int = 0
    """The part of ``eval_count`` spent on reasoning."""

    @property
    def message(self) -> ChatMessage:
        """The answer as a message, for the next request of the conversation."""
        return ChatMessage("assistant", self.content, self.reasoning, self.tool_calls)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt of a conversation."""

    prompt: str
    """The text that the model's chat template gives."""
    token_ids: tuple[int, ...]
    """The token ids of the text."""
