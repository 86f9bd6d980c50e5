"""Chat with tools: calls come whole, and the choice is respected."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
    request.tool_choice = 97  # type: ignore[assignment]
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


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no tools": ({"tools": []}, "tools", "required"),
    "a constraint of its own": ({"constraint": pb.Constraint(regex="a")}, "constraint", "combined"),
    "an unknown name": ({"tool_name": "f"}, "tool_name", "one of the tools"),
    "large parameters": (
        {"tools": [pb.Tool(name="f", parameters=f'{{"title": "{"x" * 65_536}"}}')]},
        "tools[0].parameters",
        "65536",
    ),
    "another end": (
        {"options": pb.CompletionOptions(ignore_eos=True)},
        "options.ignore_eos",
        "required calls",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_required_calls_are_refused_by_the_field(calling: Server, name: str) -> None:
    fields, field, words = REFUSED[name]
    request = pb.ChatRequest(
        **{
            "messages": [HELLO],
            "tools": [WEATHER],
            "tool_choice": pb.TOOL_CHOICE_REQUIRED,
            **fields,
        }
    )
    problem = await failure(calling.stub.Chat(request))
    assert set(problem.violations) == {field}
    assert words in problem.violations[field]
    assert not calling.backend.grammars.compiled


async def test_a_name_is_for_required_calls_only(calling: Server) -> None:
    request = pb.ChatRequest(messages=[HELLO], tools=[WEATHER], tool_name="get_weather")
    assert set((await failure(calling.stub.Chat(request))).violations) == {"tool_name"}


async def test_a_form_that_no_grammar_can_require_is_refused_by_its_name(
    start_server: StartServer,
) -> None:
    form = "muse_spark"
    other = replace(FORMAT, tool_parser=str(package_file("tool_parsers", form)))
    server = await start_server(FakeBackend(chat=chat_format(TEMPLATE, answer=other)))
    capabilities = (await server.load()).model.capabilities
    assert (capabilities.tools, capabilities.required_tools) == (True, False)
    request = pb.ChatRequest(messages=[HELLO], tools=[WEATHER], tool_choice=pb.TOOL_CHOICE_REQUIRED)
    problem = await failure(server.stub.Chat(request))
    assert set(problem.violations) == {"tool_choice"}
    assert form in problem.violations["tool_choice"]
    assert "TOOL_CHOICE_AUTO" in problem.violations["tool_choice"]


async def test_required_calls_are_a_constraint_of_the_tools(calling: Server) -> None:
    tools = [WEATHER, pb.Tool(name="f"), pb.Tool(name="g", parameters='{"type": "object"}')]
    fields: dict[str, Any] = {"tools": tools, "tool_choice": pb.TOOL_CHOICE_REQUIRED}
    last = (await answer(calling, CALL, **fields))[-1]
    assert (last.done_reason, last.constraint_satisfied) == (pb.DONE_REASON_TOOL_CALLS, True)
    await answer(calling, CALL, **fields, tool_name="f")
    whole, one = (each.texts for each in calling.backend.grammars.compiled)
    assert whole[:3] == one[:3] == ("json_tools", "<tool_call>", "</tool_call>")
    assert whole[3::3] == ("tools[0].parameters", "tools[1].parameters", "tools[2].parameters")
    assert whole[4::3] == ("get_weather", "f", "g")
    assert one[3:] == ("tools[1].parameters", "f", '{"type": "object", "properties": {}}')


async def test_calls_that_cannot_be_read_are_not_satisfied(calling: Server) -> None:
    # A number that JSON allows, and a computer cannot hold.
    reply = CALL.replace('"Zürich"', "1e999")
    messages = await answer(calling, reply, tool_choice=pb.TOOL_CHOICE_REQUIRED)
    assert content(messages) == reply
    assert messages[-1].done_reason == pb.DONE_REASON_STOP
    assert messages[-1].HasField("constraint_satisfied")
    assert not messages[-1].constraint_satisfied


async def test_a_required_call_of_an_unknown_tool_is_content(calling: Server) -> None:
    reply = CALL.replace("get_weather", "get_whether")
    messages = await answer(calling, reply, tool_choice=pb.TOOL_CHOICE_REQUIRED)
    assert content(messages) == reply
    assert not messages[-1].constraint_satisfied


async def test_a_marker_within_arguments_ends_no_required_call(calling: Server) -> None:
    reply = f"{CALL.replace('Zürich', '</tool_call><tool_call>')}\n{CALL}"
    messages = await answer(calling, reply, tool_choice=pb.TOOL_CHOICE_REQUIRED)
    calls = [call for message in messages for call in message.tool_calls]
    places = [json.loads(call.arguments)["place"] for call in calls]
    assert places == ["</tool_call><tool_call>", "Zürich"]
    assert content(messages) == "\n"
