"""Requests and results of conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_kind,
    check_text,
    refuse_type,
)
from runner_client.errors import InvalidRequestError
from runner_client.rpc.messages.requests import completion_request, named, sendable
from runner_client.rpc.messages.responses import completion_chunk, join_chunks
from runner_client.types import (
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionChunk,
    Constraint,
    Options,
    RenderedChat,
    Tool,
    ToolCall,
)
from runner_common.generation_fields import shared_fields

_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
    "developer": pb.ROLE_DEVELOPER,
}
_TOOL_CHOICES = {
    "auto": pb.TOOL_CHOICE_UNSPECIFIED,
    "none": pb.TOOL_CHOICE_NONE,
    "required": pb.TOOL_CHOICE_REQUIRED,
}


def render_chat_request(
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    chat_template_kwargs: Mapping[str, object] | None = None,
    model: str | None = None,
    literal: bool = False,
) -> pb.RenderChatRequest:
    """Build the request to render a conversation.

    Raises:
        TypeError: A value is of the wrong type.
        InvalidRequestError: A value cannot be sent.
    """
    _check_items("messages", messages, ChatMessage)
    _check_items("tools", tools, Tool)
    check_flag("literal", literal)
    with sendable():
        return pb.RenderChatRequest(
            messages=map(_message, messages),
            tools=map(_tool, tools),
            chat_template_kwargs=_json("chat_template_kwargs", chat_template_kwargs),
            model=named(model),
            literal=literal,
        )


def chat_request(
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    tool_choice: str = "auto",
    chat_template_kwargs: Mapping[str, object] | None = None,
    options: Options | None = None,
    logprobs: int | None = None,
    request_id: str = "",
    priority: int = 0,
    model: str | None = None,
    bypass_prefix_cache: bool = False,
    cache_salt: str = "",
    literal: bool = False,
    logprob_token_ids: Sequence[int] = (),
    constraint: Constraint | None = None,
    adapter: str = "",
    tool_name: str = "",
    reasoning_budget: int | None = None,
) -> pb.ChatRequest:
    """Build the request of an answer, with the errors of ``render_chat_request``."""
    _check_items("messages", messages, ChatMessage)
    _check_items("tools", tools, Tool)
    check_choice("tool_choice", tool_choice, tuple(_TOOL_CHOICES))
    check_text("tool_name", tool_name)
    check_integer("reasoning_budget", reasoning_budget)
    # The checks and the values are those of a completion.
    rest = completion_request(
        "",
        options=options,
        logprobs=logprobs,
        request_id=request_id,
        priority=priority,
        model=model,
        bypass_prefix_cache=bypass_prefix_cache,
        cache_salt=cache_salt,
        literal=literal,
        logprob_token_ids=logprob_token_ids,
        constraint=constraint,
        adapter=adapter,
    )
    with sendable():
        return pb.ChatRequest(
            messages=map(_message, messages),
            tools=map(_tool, tools),
            tool_choice=_TOOL_CHOICES[tool_choice],
            chat_template_kwargs=_json("chat_template_kwargs", chat_template_kwargs),
            tool_name=tool_name,
            reasoning_budget=reasoning_budget,
            **shared_fields(rest),
        )


def chat_chunk(message: pb.ChatResponse) -> ChatChunk:
    """Convert a message of an answer's stream."""
    return ChatChunk(
        **_values(completion_chunk(message)),
        reasoning=message.reasoning,
        tool_calls=tuple(ToolCall(c.name, c.arguments, c.id) for c in message.tool_calls),
        reasoning_eval_count=message.reasoning_eval_count,
    )


def join_chat_chunks(chunks: Sequence[ChatChunk]) -> ChatCompletion:
    """Join the chunks of a finished stream; the last chunk has ``done`` set."""
    return ChatCompletion(
        **_values(join_chunks(chunks)),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
        reasoning_eval_count=chunks[-1].reasoning_eval_count,
    )


def _values(value: CompletionChunk | Completion) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def rendered_chat(message: pb.RenderChatResponse) -> RenderedChat:
    """Convert the response of a call that renders a conversation."""
    return RenderedChat(message.prompt, tuple(message.token_ids))


def _check_items(field: str, items: object, kind: type) -> None:
    if isinstance(items, str | Mapping) or not isinstance(items, Sequence):
        refuse_type(field, items, f"a sequence of objects of the class {kind.__name__}")
    for i, item in enumerate(items):
        check_kind(f"{field}[{i}]", item, kind)


def _message(message: ChatMessage) -> pb.ChatMessage:
    content = message.content
    parts = () if content is None or isinstance(content, str) else content
    return pb.ChatMessage(
        role=_ROLES[message.role],
        content=content if isinstance(content, str) else None,
        content_parts=[pb.ContentPart(text=part) for part in parts],
        reasoning=message.reasoning,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _tool(tool: Tool) -> pb.Tool:
    return pb.Tool(
        name=tool.name,
        description=tool.description,
        parameters=_json(f"the parameters of {tool.name}", tool.schema),
    )


def _json(field: str, value: Mapping[str, object] | None) -> str:
    """Return an object as JSON; empty for none.

    Raises:
        InvalidRequestError: The value has no form in JSON.
    """
    if not value:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        text = f"it has no form in JSON: {error}"
        raise InvalidRequestError(f"{field}: {text}", field_violations=[(field, text)]) from error
