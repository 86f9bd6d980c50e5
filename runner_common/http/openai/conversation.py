"""Conversations and tools of `/v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.openai.options import json_text

if TYPE_CHECKING:
    from runner_common.http.fields import Fields

_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_DEVELOPER,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}

_REFUSED = {
    "audio": "models here read text only",
    "function_call": "replaced by tool_calls",
    "refusal": "refusals are not told apart; send them as content",
}

_NO_EFFECT = ("annotations", "refusal")
"""Fields of answers that clients send back, empty here."""

_CHOICES = {
    "auto": pb.TOOL_CHOICE_AUTO,
    "none": pb.TOOL_CHOICE_NONE,
    "required": pb.TOOL_CHOICE_REQUIRED,
}


def read_messages(fields: Fields) -> list[pb.ChatMessage]:
    """Return the messages of a conversation."""
    if not fields.has("messages"):
        fields.refuse("messages", "required: a list of messages")
    return [_message(message) for message in fields.each("messages")]


def _message(fields: Fields) -> pb.ChatMessage:
    role = fields.choice("role", tuple(_ROLES))
    if not fields.has("role"):
        fields.refuse("role", f"required: one of {', '.join(_ROLES)}")
    message = pb.ChatMessage(role=_ROLES.get(role or "user", pb.ROLE_USER))
    content = _content(fields)
    calls = fields.each("tool_calls")
    message.tool_calls.extend(_call(call) for call in calls)
    if content is not None:
        message.content = content
    elif role != "assistant":
        fields.refuse("content", "required, but may be empty")
    message.name = fields.text("name") or ""
    message.tool_call_id = fields.text("tool_call_id") or ""
    # The first of the names is that of our own answers, the second that of others.
    message.reasoning = fields.text("reasoning_content") or fields.text("reasoning") or ""
    fields.take("reasoning")
    for name in _NO_EFFECT:
        if not fields.take(name):
            continue
        fields.refuse(name, _REFUSED.get(name, "not supported"))
    fields.end(_REFUSED)
    return message


def _content(fields: Fields) -> str | None:
    """Return the text of a message, with line breaks between parts.

    Few templates read a list of parts, and one that does not would write it as Python does.
    """
    value = fields.take("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.refuse("content", "a text or a list of parts is required")
        return ""
    texts = []
    for part in fields.each("content"):
        kind = part.text("type", required=True)
        if kind == "text":
            texts.append(part.text("text", required=True) or "")
            # A mark for a cache of others, without an effect on the answer.
            part.take("cache_control")
            part.end()
        elif kind is not None:
            part.refuse("type", f"{kind[:40]!r}: models here read text only")
    return "\n".join(texts)


def _call(fields: Fields) -> pb.ToolCall:
    fields.choice("type", ("function",))
    # The index of a streamed call, which clients may keep.
    fields.take("index")
    call = pb.ToolCall(id=fields.text("id") or "")
    function = fields.inside("function")
    if function is None:
        fields.refuse("function", "required: the name of the tool and its arguments")
    else:
        call.name = function.text("name", required=True) or ""
        arguments = function.take("arguments")
        if isinstance(arguments, dict):
            call.arguments = json_text(arguments)
        elif isinstance(arguments, str):
            call.arguments = arguments
        elif arguments is not None:
            function.refuse("arguments", "the text of a JSON object is required")
        function.end()
    fields.end()
    return call


def read_tools(fields: Fields, request: pb.ChatRequest) -> None:
    """Read the tools and their choice."""
    request.tools.extend(_tool(tool) for tool in fields.each("tools"))
    choice = fields.take("tool_choice")
    if choice is None:
        return
    if isinstance(choice, str):
        if choice in _CHOICES:
            request.tool_choice = _CHOICES[choice]
        else:
            fields.refuse("tool_choice", f"{choice[:40]!r} is none of {', '.join(_CHOICES)}")
    elif (named := fields.inside("tool_choice")) is not None:
        request.tool_choice = pb.TOOL_CHOICE_REQUIRED
        request.tool_name = _named(named)
    # As in OpenAI's interface, where `auto` and `none` need no tools.
    if request.tool_choice == pb.TOOL_CHOICE_REQUIRED and not request.tools:
        fields.refuse("tool_choice", "only with tools")


def _named(fields: Fields) -> str:
    """Return the name of the required tool."""
    kind = fields.text("type", required=True)
    function = fields.inside("function")
    name = function.text("name", required=True) if function else None
    if kind != "function" and kind is not None:
        fields.refuse("type", f"{kind[:40]!r}: only a function can be named")
    elif function is None:
        fields.refuse("function", "required: the name of the tool")
    else:
        function.end()
        fields.end()
    return name or ""


def _tool(fields: Fields) -> pb.Tool:
    kind = fields.text("type", required=True)
    tool = pb.Tool()
    if kind is not None and kind != "function":
        fields.refuse("type", f"{kind[:40]!r}: only functions are supported")
        return tool
    function = fields.inside("function")
    if function is None:
        fields.refuse("function", "required: name and parameters of the tool")
        return tool
    tool.name = function.text("name", required=True) or ""
    tool.description = function.text("description") or ""
    if (parameters := function.mapping("parameters")) is not None:
        tool.parameters = json_text(parameters)
    # Arguments are bound to the schema when calls are required, and only then.
    function.boolean("strict")
    function.end()
    fields.end()
    return tool
