"""Chat with tools: calls come whole, and the choice is respected."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.format import CONTENT, REASONING, TOOL, AnswerFormat
from runner_server.mlx_backend.upstream.package_files import package_file
from support.fakes import FakeBackend, chat_format, says
from support.harness import Server, StartServer, failure

PARSER = package_file("tool_parsers", "json_tools")
if PARSER is None:
    pytest.skip("mlx_lm is not installed (the server extra)", allow_module_level=True)

HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="hé")
WEATHER = pb.Tool(name="get_weather", parameters='{"type": "object"}')
TEMPLATE = "{{ tools | tojson if tools else 'none' }}"
FORMAT = AnswerFormat(
    {
        CONTENT: (("<think>", REASONING), ("<tool_call>", TOOL)),
        REASONING: (("</think>", CONTENT), ("<tool_call>", TOOL)),
        TOOL: (("</tool_call>", CONTENT),),
    },
    think_start="<think>",
    tool_parser=str(PARSER),
)
CALL = '<tool_call>{"name": "get_weather", "arguments": {"place": "Zürich"}}</tool_call>'


@pytest.fixture
async def calling(start_server: StartServer) -> Server:
    """A server with a tool-calling model."""
    server = await start_server(FakeBackend(chat=chat_format(TEMPLATE, answer=FORMAT)))
    assert (await server.load()).model.capabilities.tools
    return server


async def answer(server: Server, reply: str, **fields: Any) -> list[pb.ChatResponse]:
    """Return the messages of an answer, generated one byte a token."""
    server.backend.reply = says(reply)
    fields.setdefault("tools", [WEATHER])
    request = pb.ChatRequest(messages=[HELLO], **fields)
    return [message async for message in server.stub.Chat(request)]


def content(messages: list[pb.ChatResponse]) -> str:
    """Return the text of an answer."""
    return "".join(message.content for message in messages)


async def test_calls_come_whole_and_with_ids(calling: Server) -> None:
    messages = await answer(calling, f"<think>Hm</think>I look.{CALL}{CALL}")
    calls = [call for message in messages for call in message.tool_calls]
    assert [call.name for call in calls] == ["get_weather"] * 2
    assert [json.loads(call.arguments) for call in calls] == [{"place": "Zürich"}] * 2
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.id) for call in calls)
    assert calls[0].id != calls[1].id
    assert content(messages) == "I look."
    assert "".join(message.reasoning for message in messages) == "Hm"
    last = messages[-1]
    assert last.done_reason == pb.DONE_REASON_TOOL_CALLS
    assert last.eval_count == len(f"<think>Hm</think>I look.{CALL}{CALL}".encode()) + 1


async def test_an_answer_without_calls_ends_as_usual(calling: Server) -> None:
    messages = await answer(calling, "No.")
    assert messages[-1].done_reason == pb.DONE_REASON_STOP
    assert content(messages) == "No."


async def test_a_call_that_is_cut_off_is_content(calling: Server) -> None:
    messages = await answer(calling, CALL, options=pb.CompletionOptions(num_predict=30))
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH
    assert content(messages) == CALL.encode()[:30].decode()


async def test_tools_reach_the_template(calling: Server) -> None:
    reply = (await answer(calling, "x"))[-1]
    plain = (await answer(calling, "x", tools=[]))[-1]
    assert reply.prompt_eval_count > plain.prompt_eval_count == len("none")
    rendered = await calling.stub.RenderChat(
        pb.RenderChatRequest(messages=[HELLO], tools=[WEATHER])
    )
    assert reply.prompt_eval_count == len(rendered.token_ids)


@pytest.mark.parametrize(
    "fields",
    [{"tool_choice": pb.TOOL_CHOICE_NONE}, {"tools": []}],
    ids=["the choice is none", "no tools"],
)
async def test_without_tools_all_is_text(calling: Server, fields: dict[str, Any]) -> None:
    messages = await answer(calling, f"a{CALL}", **fields)
    assert content(messages) == f"a{CALL}"
    assert messages[-1].prompt_eval_count == len("none")
    assert messages[-1].done_reason == pb.DONE_REASON_STOP


async def test_an_unknown_choice_is_refused(calling: Server) -> None:
    # As a later client would send a choice that this server does not know.
    request = pb.ChatRequest(messages=[HELLO], tools=[WEATHER])
    request.tool_choice = 3  # type: ignore[assignment]
    problem = await failure(calling.stub.Chat(request))
    assert set(problem.violations) == {"tool_choice"}


async def test_tools_are_refused_if_calls_cannot_be_told_apart(loaded: Server) -> None:
    assert not (await loaded.status()).model.capabilities.tools
    request = pb.ChatRequest(messages=[HELLO], tools=[WEATHER])
    problem = await failure(loaded.stub.Chat(request))
    assert problem.reason == "INVALID_FIELD"
    assert "tool_parser_type" in problem.violations["tools"]
    request.tool_choice = pb.TOOL_CHOICE_NONE
    request.options.num_predict = 1
    assert [message async for message in loaded.stub.Chat(request)][-1].done


async def test_a_wrong_tool_is_refused_by_its_field(calling: Server) -> None:
    request = pb.ChatRequest(messages=[HELLO], tools=[pb.Tool(name="f", parameters="[")])
    assert set((await failure(calling.stub.Chat(request))).violations) == {"tools[0].parameters"}
