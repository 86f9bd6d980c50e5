"""Validation of conversations, and their conversion to what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.violations import ViolationCollector
from runner_server.chat.renderer import Conversation

MAX_MESSAGES = 16_384
MAX_TOOLS = 1024

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
    pb.ROLE_DEVELOPER: "developer",
}

_TOOL_CHOICES = (
    pb.TOOL_CHOICE_UNSPECIFIED,
    pb.TOOL_CHOICE_AUTO,
    pb.TOOL_CHOICE_NONE,
    pb.TOOL_CHOICE_REQUIRED,
)

_OWN_ARGUMENTS = ("messages", "tools", "add_generation_prompt")
"""Arguments of templates that come from other fields."""

_NO_PARAMETERS = {"type": "object", "properties": {}}


def conversation_of(request: pb.RenderChatRequest | pb.ChatRequest) -> Conversation:
    """Validate a conversation and convert it. Takes half a second for the largest request.

    Raises:
        InvalidField: A field is missing or out of range.
    """
    check = ViolationCollector()
    conversation = read_conversation(check, request)
    check.finish()
    return conversation


def read_conversation(
    check: ViolationCollector, request: pb.RenderChatRequest | pb.ChatRequest
) -> Conversation:
    """Convert a conversation, and record the problems.

    Args:
        check: Collects the violations, with any of which the result is useless.
        request: The request.
    """
    if isinstance(request, pb.ChatRequest):
        known = request.tool_choice in _TOOL_CHOICES
        check.require("tool_choice", known, "not a choice that this server supports")
    arguments = _arguments(check, request.chat_template_kwargs)
    has_messages = _check_count(check, "messages", len(request.messages), 1, MAX_MESSAGES)
    has_tools = _check_count(check, "tools", len(request.tools), 0, MAX_TOOLS)
    # More of them would take longer to check than it is worth.
    messages = enumerate(request.messages if has_messages else ())
    tools = enumerate(request.tools if has_tools else ())
    return Conversation(
        messages=[_message(check, f"messages[{i}]", message) for i, message in messages],
        tools=[_tool(check, f"tools[{i}]", tool) for i, tool in tools] or None,
        arguments=arguments,
    )


def _check_count(check: ViolationCollector, field: str, count: int, low: int, high: int) -> bool:
    is_inside = low <= count <= high
    check.require(field, is_inside, f"{count} entries; {low} to {high}")
    return is_inside


def _message(check: ViolationCollector, path: str, message: pb.ChatMessage) -> dict[str, Any]:
    """Return a message; a field that is not set has no key, like in transformers."""
    known = message.role in _ROLES
    check.require(f"{path}.role", known, "required: one of the roles that this server supports")
    found: dict[str, Any] = {"role": _ROLES.get(message.role, "")}
    is_assistant = message.role == pb.ROLE_ASSISTANT
    _check_content(check, path, message)
    if message.HasField("content"):
        found["content"] = message.content
    elif message.content_parts:
        found["content"] = _parts(check, f"{path}.content_parts", message.content_parts)
    if message.reasoning:
        _only(check, f"{path}.reasoning", "ROLE_ASSISTANT", ok=is_assistant)
        found["reasoning_content"] = message.reasoning
    if message.tool_calls:
        _only(check, f"{path}.tool_calls", "ROLE_ASSISTANT", ok=is_assistant)
        calls = enumerate(message.tool_calls)
        found["tool_calls"] = [_tool_call(check, f"{path}.tool_calls[{i}]", c) for i, c in calls]
    if message.tool_call_id:
        _only(check, f"{path}.tool_call_id", "ROLE_TOOL", ok=message.role == pb.ROLE_TOOL)
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _check_content(check: ViolationCollector, path: str, message: pb.ChatMessage) -> None:
    count = message.HasField("content") + bool(message.content_parts)
    check.require(f"{path}.content_parts", count <= 1, "set content or content_parts, not both")
    optional = message.role == pb.ROLE_ASSISTANT
    check.require(f"{path}.content", count > 0 or optional, "required, but may be empty")


def _only(check: ViolationCollector, field: str, role: str, *, ok: bool) -> None:
    check.require(field, ok, f"only messages with {role} have this")


def _parts(
    check: ViolationCollector, path: str, parts: Sequence[pb.ContentPart]
) -> list[dict[str, str]]:
    for i, part in enumerate(parts):
        check.require(f"{path}[{i}].part", part.HasField("text"), "required: text")
    return [{"type": "text", "text": part.text} for part in parts]


def _tool_call(check: ViolationCollector, path: str, call: pb.ToolCall) -> dict[str, Any]:
    check.require(f"{path}.name", bool(call.name), "required: the name of the tool")
    arguments = _json_object(check, f"{path}.arguments", call.arguments)
    found: dict[str, Any] = {"id": call.id} if call.id else {}
    return {
        **found,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _tool(check: ViolationCollector, path: str, tool: pb.Tool) -> dict[str, Any]:
    check.require(f"{path}.name", bool(tool.name), "required: the name of the tool")
    parameters = _json_object(check, f"{path}.parameters", tool.parameters)
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = parameters or _NO_PARAMETERS
    return {"type": "function", "function": function}


def _arguments(check: ViolationCollector, text: str) -> dict[str, Any]:
    arguments = _json_object(check, "chat_template_kwargs", text)
    for name in _OWN_ARGUMENTS:
        check.require(
            f"chat_template_kwargs.{name}", name not in arguments, "set by the request's own fields"
        )
    return arguments


def _json_object(check: ViolationCollector, field: str, text: str) -> dict[str, Any]:
    """Return the object in a JSON text; empty for an empty text, or with a problem recorded."""
    if not text:
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        check.require(field, ok=False, text=f"not a JSON object: {error}")
        return {}
    is_object = isinstance(found, dict)
    check.require(field, is_object, f"a JSON object is required, not a {type(found).__name__}")
    return found if is_object else {}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
