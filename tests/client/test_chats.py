"""Conversations: arguments of the client against the fake runner."""

from __future__ import annotations

from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import (
    AsyncRunnerClient,
    ChatMessage,
    Regex,
    RunnerClient,
    Tool,
    ToolCall,
    errors,
)
from runner_client.testing import Failure, FakeRunner
from runner_client.types import DoneReason, Options, RenderedChat

MESSAGES = [
    ChatMessage("system", ""),
    ChatMessage("user", ("a", "b")),
    ChatMessage("assistant", reasoning="hm", tool_calls=(ToolCall("f", '{"x": 1}', id="c1"),)),
    ChatMessage("tool", "5", tool_call_id="c1", name="f"),
]
TOOLS = [Tool("f", "does f", {"type": "object", "title": "é"}), Tool("g")]
SENT = [
    pb.ChatMessage(role=pb.ROLE_SYSTEM, content=""),
    pb.ChatMessage(
        role=pb.ROLE_USER, content_parts=[pb.ContentPart(text="a"), pb.ContentPart(text="b")]
    ),
    pb.ChatMessage(
        role=pb.ROLE_ASSISTANT,
        reasoning="hm",
        tool_calls=[pb.ToolCall(id="c1", name="f", arguments='{"x": 1}')],
    ),
    pb.ChatMessage(role=pb.ROLE_TOOL, content="5", tool_call_id="c1", name="f"),
]
SENT_TOOLS = [
    pb.Tool(name="f", description="does f", parameters='{"type": "object", "title": "é"}'),
    pb.Tool(name="g"),
]


def test_the_request_to_render_carries_all_arguments(
    client: RunnerClient, runner: FakeRunner
) -> None:
    kwargs = {"enable_thinking": False}
    client.render_chat(
        MESSAGES, tools=TOOLS, chat_template_kwargs=kwargs, model="fake", literal=True
    )
    assert runner.requests == [
        pb.RenderChatRequest(
            messages=SENT,
            tools=SENT_TOOLS,
            chat_template_kwargs='{"enable_thinking": false}',
            model="fake",
            literal=True,
        )
    ]


def test_the_request_of_an_answer_carries_all_arguments(
    client: RunnerClient, runner: FakeRunner
) -> None:
    client.complete_chat(
        MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        tool_name="f",
        reasoning_budget=0,
        chat_template_kwargs={"x": "é"},
        options=Options(temperature=0, stop=("\n",)),
        logprobs=2,
        request_id="me",
        priority=-7,
        model="fake",
        bypass_prefix_cache=True,
        cache_salt="alice",
        literal=True,
        logprob_token_ids=(4, 2),
        constraint=Regex("[a-z]+"),
    )
    assert runner.requests == [
        pb.ChatRequest(
            messages=SENT,
            tools=SENT_TOOLS,
            tool_choice=pb.TOOL_CHOICE_REQUIRED,
            tool_name="f",
            reasoning_budget=0,
            chat_template_kwargs='{"x": "é"}',
            options=pb.CompletionOptions(temperature=0, stop=["\n"]),
            logprobs=2,
            request_id="me",
            priority=-7,
            model="fake",
            bypass_prefix_cache=True,
            cache_salt="alice",
            literal=True,
            logprob_token_ids=[4, 2],
            constraint=pb.Constraint(regex="[a-z]+"),
        )
    ]


def test_an_answer_tells_what_a_completion_tells(client: RunnerClient, runner: FakeRunner) -> None:
    runner.prompt_cached_count = 5
    answer = client.complete_chat(
        MESSAGES,
        bypass_prefix_cache=True,
        logprob_token_ids=(1, 0),
        constraint=Regex("[a-z]+"),
        options=Options(stop_token_ids=(1,)),
    )
    assert (answer.content, answer.constraint_satisfied) == ("Hello", True)
    assert answer.prompt_cached_count == 0
    assert [each.token_id for each in answer.logprobs[0].candidates] == [1, 0]
    plain = client.complete_chat(MESSAGES)
    assert (plain.constraint_satisfied, plain.prompt_cached_count) == (None, 5)


def test_an_answer_streams_its_chunks(client: RunnerClient, runner: FakeRunner) -> None:
    runner.prompt_cached_count = 5
    with client.chat(MESSAGES, logprobs=0) as stream:
        chunks = list(stream)
    assert [chunk.content for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk.done for chunk in chunks] == [False, False, True]
    assert chunks[0].logprobs[0].text == "Hello"
    assert chunks[-1].done_reason is DoneReason.STOP
    assert (chunks[-1].eval_count, chunks[-1].prompt_cached_count) == (2, 5)


def test_a_finished_answer_is_the_next_message(client: RunnerClient) -> None:
    answer = client.complete_chat(MESSAGES)
    assert (answer.content, answer.token_ids) == ("Hello world", (0, 1))
    assert answer.message == ChatMessage("assistant", "Hello world")


def test_reasoning_comes_apart(client: RunnerClient, runner: FakeRunner) -> None:
    runner.reasoning = ("I ", "think")
    answer = client.complete_chat(MESSAGES)
    assert (answer.reasoning, answer.content) == ("I think", "Hello world")
    assert (answer.reasoning_eval_count, answer.eval_count) == (2, 4)
    assert answer.message == ChatMessage("assistant", "Hello world", "I think")
    assert client.complete("x").content == "Hello world"


def test_calls_of_tools_come_with_the_answer(client: RunnerClient, runner: FakeRunner) -> None:
    runner.tool_calls = [pb.ToolCall(id="c1", name="f", arguments='{"x": 1}')]
    answer = client.complete_chat(MESSAGES, tools=TOOLS)
    assert answer.tool_calls == (ToolCall("f", '{"x": 1}', "c1"),)
    assert answer.done_reason is DoneReason.TOOL_CALLS
    assert answer.message.tool_calls == answer.tool_calls
    assert client.complete_chat(MESSAGES).tool_calls == ()


def test_an_unknown_choice_of_tools_is_refused(client: RunnerClient) -> None:
    with pytest.raises(errors.InvalidRequestError, match="tool_choice"):
        client.chat(MESSAGES, tools=TOOLS, tool_choice="maybe")  # type: ignore[arg-type]


async def test_the_asyncio_client_streams_too(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        async with client.chat(MESSAGES) as stream:
            assert [chunk.content async for chunk in stream] == ["Hello", " world", ""]
        assert (await client.complete_chat(MESSAGES)).content == "Hello world"


@pytest.mark.parametrize("stops_after", [0, 1])
def test_an_answer_without_its_last_chunk_is_an_error(
    client: RunnerClient, runner: FakeRunner, stops_after: int
) -> None:
    runner.pieces, runner.is_complete = ("a",) * stops_after, False
    with pytest.raises(errors.IncompleteStreamError):
        client.complete_chat(MESSAGES)


def test_leaving_the_block_cancels_the_answer(client: RunnerClient, runner: FakeRunner) -> None:
    runner.stall_after = 1
    with client.chat(MESSAGES) as stream:
        next(stream)
    assert runner.cancelled.wait(20)


def test_a_closed_client_starts_no_answer(runner: FakeRunner) -> None:
    client = RunnerClient(runner.address)
    client.close()
    with pytest.raises(errors.RunnerUnavailableError):
        client.complete_chat(MESSAGES)


def test_a_prompt_comes_back(client: RunnerClient) -> None:
    rendered = client.render_chat([ChatMessage("system", "x"), ChatMessage("user", ("y", "z"))])
    assert rendered == RenderedChat("x\nyz", tuple(map(ord, "x\nyz")))


async def test_the_asyncio_client_renders_too(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        assert (await client.render_chat([ChatMessage("user", "x")])).prompt == "x"


def test_an_error_is_raised(client: RunnerClient, runner: FakeRunner) -> None:
    runner.failure = Failure("MODEL_UNSUPPORTED", "the template is not valid")
    with pytest.raises(errors.ModelUnsupportedError, match="not valid"):
        client.render_chat(MESSAGES)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hello"}, "messages is a sequence"),
    ({"messages": [{"role": "user", "content": "x"}]}, r"messages\[0\].*ChatMessage\(role='user'"),
    ({"messages": MESSAGES, "tools": [5]}, r"tools\[0\] is an object of the class Tool"),
    ({"messages": MESSAGES, "model": 5}, "model is"),
    ({"messages": MESSAGES, "literal": "yes"}, "literal is"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG)
def test_a_wrong_type_is_named(client: RunnerClient, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        client.render_chat(**arguments)


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": object()}])
def test_an_argument_without_a_form_in_json_is_refused(client: RunnerClient, value: Any) -> None:
    with pytest.raises(errors.InvalidRequestError, match="chat_template_kwargs"):
        client.render_chat(MESSAGES, chat_template_kwargs=value)


WRONG_PARTS: list[tuple[type[Any], tuple[Any, ...], type[Exception]]] = [
    (ChatMessage, ("bot", "x"), errors.InvalidRequestError),
    (ChatMessage, ("user", 5), TypeError),
    (ChatMessage, ("user", b"x"), TypeError),
    (ChatMessage, ("user", "x", None), TypeError),
    (ChatMessage, ("user", "x", "", ({"name": "f"},)), TypeError),
    (Tool, (5,), TypeError),
    (Tool, ("f", "", "{}"), TypeError),
    (ToolCall, ("f", {"x": 1}), TypeError),
]


@pytest.mark.parametrize(("kind", "arguments", "error"), WRONG_PARTS)
def test_a_wrong_part_is_refused_when_it_is_made(
    kind: type[Any], arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        kind(*arguments)
