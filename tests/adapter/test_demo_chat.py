"""Conversations with the demo model: its template, a call of a tool, and the answer after it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Server

OPTIONS = pb.CompletionOptions(temperature=0, num_predict=60)
WEATHER = pb.Tool(
    name="get_weather",
    description="Get the weather of a place.",
    parameters=json.dumps(
        {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    ),
)
TIMER = pb.Tool(
    name="set_timer",
    description="Start a timer.",
    parameters=json.dumps({"type": "object", "properties": {"minutes": {"type": "integer"}}}),
)


def user(text: str) -> pb.ChatMessage:
    """Return a message of the user."""
    return pb.ChatMessage(role=pb.ROLE_USER, content=text)


async def ask(
    demo: Server, messages: list[pb.ChatMessage], tools: list[pb.Tool]
) -> tuple[str, list[pb.ToolCall], pb.DoneReason.ValueType]:
    """Return the text of the answer, its calls, and why it ended."""
    request = pb.ChatRequest(messages=messages, tools=tools, options=OPTIONS)
    parts = [part async for part in demo.stub.Chat(request)]
    calls = [call for part in parts for call in part.tool_calls]
    return "".join(part.content for part in parts), calls, parts[-1].done_reason


@pytest.mark.parametrize("place", ["Oslo", "Berlin", "Paris"])
async def test_a_question_is_answered_with_a_call_of_the_tool(demo: Server, place: str) -> None:
    assert (await demo.status()).model.capabilities.tools
    text, calls, reason = await ask(demo, [user(f"What is the weather in {place}?")], [WEATHER])
    assert reason == pb.DONE_REASON_TOOL_CALLS
    assert not text
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"place": place})
    ]


async def test_the_answer_after_a_call_has_its_result(demo: Server) -> None:
    call = pb.ToolCall(id="1", name="get_weather", arguments='{"place": "Oslo"}')
    messages = [
        user("What is the weather in Oslo?"),
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[call]),
        pb.ChatMessage(
            role=pb.ROLE_TOOL,
            content='{"weather": "sunny", "temperature": 21}',
            tool_call_id=call.id,
            name=call.name,
        ),
    ]
    answer = await ask(demo, messages, [WEATHER])
    assert answer == ("It is sunny in Oslo, with 21 degrees.", [], pb.DONE_REASON_STOP)


async def test_a_greeting_is_answered_in_words_although_there_are_tools(demo: Server) -> None:
    text, calls, reason = await ask(demo, [user("Hello!")], [WEATHER, TIMER])
    assert not calls
    assert reason == pb.DONE_REASON_STOP
    assert text.startswith("Hello")


async def test_the_template_writes_turns_the_tools_and_their_results(demo: Server) -> None:
    messages = [
        pb.ChatMessage(role=pb.ROLE_SYSTEM, content="Be brief."),
        user("Weather?"),
        pb.ChatMessage(
            role=pb.ROLE_ASSISTANT,
            tool_calls=[pb.ToolCall(name="get_weather", arguments='{"place": "Köln"}')],
        ),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="sunny"),
    ]
    request = pb.RenderChatRequest(messages=messages, tools=[WEATHER, TIMER])
    assert (await demo.stub.RenderChat(request)).prompt == (
        "<|system|>\nBe brief.\n- get_weather(place: string) Get the weather of a place.\n"
        "- set_timer(minutes: integer) Start a timer.\n<|end|>\n<|user|>\nWeather?<|end|>\n"
        '<|assistant|>\n<tool_call>{"name": "get_weather", "arguments": {"place": "Köln"}}'
        "</tool_call><|end|>\n<|user|>\n<tool_response>sunny</tool_response><|end|>\n<|assistant|>\n"
    )


async def test_a_tool_without_a_description_of_itself_is_rendered(demo: Server) -> None:
    tools = [pb.Tool(name="now"), pb.Tool(name="f", parameters='{"properties": {"x": {}}}')]
    request = pb.RenderChatRequest(messages=[user("a")], tools=tools)
    assert (await demo.stub.RenderChat(request)).prompt == (
        "<|system|>\n- now() \n- f(x: any) \n<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n"
    )


async def test_plain_turns_are_one_line_of_role_and_text_each(demo: Server) -> None:
    messages = [user("Hi"), pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="Hello"), user("And?")]
    rendered = await demo.stub.RenderChat(pb.RenderChatRequest(messages=messages))
    assert rendered.prompt == (
        "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nAnd?<|end|>\n<|assistant|>\n"
    )


async def test_text_in_parts_is_rendered_like_text(demo: Server) -> None:
    parts = [pb.ContentPart(text="What is "), pb.ContentPart(text="a list?")]
    whole, divided = [
        await demo.stub.RenderChat(pb.RenderChatRequest(messages=[message]))
        for message in (
            user("What is a list?"),
            pb.ChatMessage(role=pb.ROLE_USER, content_parts=parts),
        )
    ]
    assert divided == whole
