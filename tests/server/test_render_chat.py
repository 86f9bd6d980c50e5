"""RenderChat: the prompt of a conversation, and refusals by field."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import CHAT_TEMPLATE, FakeBackend, chat_format
from support.harness import Server, StartServer, failure

USER, ASSISTANT, TOOL = pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_TOOL
HELLO = pb.ChatMessage(role=USER, content="hé")
SHOW = "{{ messages | tojson }} {{ tools | tojson }}"


def part(text: str) -> pb.ContentPart:
    """Return a part of a message."""
    return pb.ContentPart(text=text)


async def render(server: Server, **fields: Any) -> pb.RenderChatResponse:
    """Render a conversation, by default of one message."""
    fields.setdefault("messages", [HELLO])
    return await server.stub.RenderChat(pb.RenderChatRequest(**fields))


async def seen(start_server: StartServer, **fields: Any) -> tuple[Any, Any]:
    """Return the messages and tools that a template gets."""
    server = await start_server(FakeBackend(chat=chat_format(SHOW)))
    await server.load()
    text = (await render(server, **fields)).prompt
    decoder = json.JSONDecoder()
    messages, end = decoder.raw_decode(text)
    return messages, json.loads(text[end:])


async def test_a_prompt_and_its_tokens_come_back(loaded: Server) -> None:
    answer = await render(loaded)
    assert answer.prompt == "<user>hé<assistant>"
    # Without a beginning-of-text token, which a template writes itself.
    assert list(answer.token_ids) == [*answer.prompt.encode()]


async def test_a_template_gets_the_fields_that_are_set(start_server: StartServer) -> None:
    call = pb.ToolCall(id="c1", name="f", arguments='{"b": 1, "a": [null, 2.5]}')
    messages = [
        pb.ChatMessage(role=pb.ROLE_SYSTEM, content=""),
        pb.ChatMessage(role=pb.ROLE_DEVELOPER, content="brief"),
        pb.ChatMessage(role=USER, content_parts=map(part, ("a", ""))),
        pb.ChatMessage(role=ASSISTANT, reasoning="hm", tool_calls=[call, pb.ToolCall(name="g")]),
        pb.ChatMessage(role=TOOL, content="5", tool_call_id="c1", name="f"),
    ]
    parameters = '{"type": "object", "properties": {"x": {"type": "integer"}}}'
    tools = [pb.Tool(name="f", description="does f", parameters=parameters), pb.Tool(name="g")]
    got, got_tools = await seen(start_server, messages=messages, tools=tools)
    assert got == [
        {"role": "system", "content": ""},
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {
            "role": "assistant",
            "thinking": "hm",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "f", "arguments": {"b": 1, "a": [None, 2.5]}},
                },
                {"type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"},
    ]
    # The order of a schema's keys is part of the prompt.
    assert list(got[3]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert [tool["function"] for tool in got_tools] == [
        {"name": "f", "description": "does f", "parameters": json.loads(parameters)},
        {"name": "g", "parameters": {"type": "object", "properties": {}}},
    ]


async def test_arguments_reach_the_template(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(chat=chat_format("{{ enable_thinking }}{{ x.y }}")))
    await server.load()
    kwargs = '{"enable_thinking": false, "x": {"y": "é"}}'
    assert (await render(server, chat_template_kwargs=kwargs)).prompt == "Falseé"


MESSAGES: dict[str, tuple[pb.ChatMessage, str]] = {
    "no role": (pb.ChatMessage(content="x"), "messages[0].role"),
    "no content": (pb.ChatMessage(role=USER), "messages[0].content"),
    "no content of a tool": (pb.ChatMessage(role=TOOL), "messages[0].content"),
    "content twice": (
        pb.ChatMessage(role=USER, content="", content_parts=[pb.ContentPart(text="x")]),
        "messages[0].content_parts",
    ),
    "an empty part": (
        pb.ChatMessage(role=USER, content_parts=[pb.ContentPart()]),
        "messages[0].content_parts[0].part",
    ),
    "reasoning of the user": (
        pb.ChatMessage(role=USER, content="x", reasoning="y"),
        "messages[0].reasoning",
    ),
    "a call by the user": (
        pb.ChatMessage(role=USER, content="x", tool_calls=[pb.ToolCall(name="f")]),
        "messages[0].tool_calls",
    ),
    "a call without a name": (
        pb.ChatMessage(role=ASSISTANT, tool_calls=[pb.ToolCall()]),
        "messages[0].tool_calls[0].name",
    ),
    "arguments that are no object": (
        pb.ChatMessage(role=ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments="[1]")]),
        "messages[0].tool_calls[0].arguments",
    ),
    "an answer by the user": (
        pb.ChatMessage(role=USER, content="x", tool_call_id="c"),
        "messages[0].tool_call_id",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_a_wrong_message_is_refused_by_its_field(loaded: Server, name: str) -> None:
    message, field = MESSAGES[name]
    problem = await failure(render(loaded, messages=[message]))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {field}


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no message": ({"messages": []}, "messages"),
    "too many messages": ({"messages": [HELLO] * 16_385}, "messages"),
    "too many tools": ({"tools": [pb.Tool(name="f")] * 1025}, "tools"),
    "a tool without a name": ({"tools": [pb.Tool()]}, "tools[0].name"),
    "a schema that is no JSON": (
        {"tools": [pb.Tool(name="f", parameters="{")]},
        "tools[0].parameters",
    ),
    "a schema with NaN": (
        {"tools": [pb.Tool(name="f", parameters='{"x": NaN}')]},
        "tools[0].parameters",
    ),
    "a deep schema": (
        {"tools": [pb.Tool(name="f", parameters='{"x": ' + "[" * 100_000)]},
        "tools[0].parameters",
    ),
    "arguments that are no object": ({"chat_template_kwargs": '"x"'}, "chat_template_kwargs"),
    "an argument of another field": (
        {"chat_template_kwargs": '{"messages": []}'},
        "chat_template_kwargs.messages",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_wrong_request_is_refused_by_its_field(loaded: Server, name: str) -> None:
    fields, field = REQUESTS[name]
    problem = await failure(render(loaded, **fields))
    assert problem.reason == "INVALID_FIELD"
    assert set(problem.violations) == {field}


async def test_a_templates_words_reach_the_caller(start_server: StartServer) -> None:
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    server = await start_server(FakeBackend(chat=chat_format(template)))
    await server.load()
    problem = await failure(render(server))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "Conversation roles must alternate" in problem.violations["messages"]


async def test_an_invalid_template_is_told(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(chat=chat_format("{% bad %}")))
    await server.load()
    problem = await failure(render(server))
    assert problem.reason == "MODEL_UNSUPPORTED"
    assert problem.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_prompt_beyond_four_mebibytes_is_refused(loaded: Server) -> None:
    overhead = len(CHAT_TEMPLATE) + 1024
    fits = 2**20 - overhead
    for size, is_fit in ((fits, True), (2 * 2**20, False), (2**22, False)):
        message = pb.ChatMessage(role=USER, content="x" * size)
        if is_fit:
            assert len((await render(loaded, messages=[message])).token_ids) > size
        else:
            problem = await failure(render(loaded, messages=[message]))
            assert set(problem.violations) == {"messages"}
