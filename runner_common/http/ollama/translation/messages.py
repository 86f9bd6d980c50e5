"""Messages, tools and formats of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    from runner_common.http.ollama.translation.fields import Fields

NO_IMAGES = "images are not supported: this server's models read text"

_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
    "developer": pb.ROLE_DEVELOPER,
}


def read_message(fields: Fields) -> pb.ChatMessage:
    """Translate one message of a conversation.

    Raises:
        UnreadableRequestError: A part of it cannot be used.
    """
    role = _ROLES.get((fields.text("role") or "").lower())
    if role is None:
        fields.refuse("role", f"must be one of {', '.join(_ROLES)}")
    fields.refuse_set(("images",), NO_IMAGES)
    content = fields.text("content")
    if content is None and role != pb.ROLE_ASSISTANT:
        content = ""
    message = pb.ChatMessage(
        role=role,
        content=content,
        reasoning=fields.text("thinking") or "",
        tool_calls=[_read_call(call) for call in fields.inners("tool_calls")],
        tool_call_id=fields.text("tool_call_id") or "",
        name=fields.text("tool_name") or "",
    )
    fields.finish()
    return message


def _read_call(fields: Fields) -> pb.ToolCall:
    function = fields.inner("function")
    if function is None:
        fields.refuse("function", "is required")
    # The type is OpenAI's, and the index is that of an answer; neither says anything here.
    fields.text("type")
    function.whole("index")
    call = pb.ToolCall(
        id=fields.text("id") or "",
        name=function.text("name") or "",
        arguments=function.json("arguments") or "",
    )
    function.finish()
    fields.finish()
    return call


def read_tool(fields: Fields) -> pb.Tool:
    """Translate the description of a tool.

    Raises:
        UnreadableRequestError: A part of it cannot be used.
    """
    if (kind := fields.text("type")) not in (None, "", "function"):
        fields.refuse("type", f"is {kind[:40]!r}; must be function")
    function = fields.inner("function")
    if function is None:
        fields.refuse("function", "is required")
    tool = pb.Tool(
        name=function.text("name") or "",
        description=function.text("description") or "",
        parameters=function.json("parameters") or "",
    )
    function.finish()
    fields.finish()
    return tool


def read_format(fields: Fields) -> pb.Constraint | None:
    """Translate what an answer must be: ``"json"``, or a JSON schema.

    Raises:
        UnreadableRequestError: It is neither.
    """
    value = fields.value("format")
    if value is None or value == "":
        return None
    if value == "json":
        return pb.Constraint(json_object=pb.JsonObject())
    if not isinstance(value, dict):
        fields.refuse("format", 'must be "json" or a JSON schema, an object')
    return pb.Constraint(json_schema=fields.json("format") or "")
