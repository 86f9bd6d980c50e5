"""Chat: answers stream like completions of the rendered prompt."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.chat.encoding import chat_message
from runner_server.chat.answer import Answer
from runner_server.chat.format import AnswerFormat
from runner_server.engine.types import CachePolicy, Constraint, OutputDelta
from runner_server.telemetry import request_log
from runner_server.telemetry.request_log import RequestLine
from support.fakes import CONTEXT_LENGTH, DEADLINE_SECONDS, FakeBackend, chat_format, says
from support.harness import Server, StartServer, eventually, failure, tokens

HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="hé")

ChatCall = grpc.aio.UnaryStreamCall[pb.ChatRequest, pb.ChatResponse]


def chat(server: Server, **fields: Any) -> ChatCall:
    """Start an answer; fields of the completion options go into the options."""
    names = pb.CompletionOptions.DESCRIPTOR.fields_by_name
    options = {name: fields.pop(name) for name in list(fields) if name in names}
    fields.setdefault("messages", [HELLO])
    request = pb.ChatRequest(options=pb.CompletionOptions(**options), **fields)
    return server.stub.Chat(request, timeout=DEADLINE_SECONDS)


async def read(call: ChatCall) -> list[pb.ChatResponse]:
    """Read an answer to its end."""
    return [message async for message in call]


def content(messages: list[pb.ChatResponse]) -> str:
    """Return the text of an answer."""
    return "".join(message.content for message in messages)


async def test_an_answer_is_the_completion_of_the_rendered_prompt(loaded: Server) -> None:
    options: dict[str, Any] = {"seed": 7, "num_predict": 40, "stop": ["zz"], "logit_bias": {5: 1.0}}
    answer = await read(chat(loaded, logprobs=2, **options))
    rendered = await loaded.stub.RenderChat(pb.RenderChatRequest(messages=[HELLO]))
    request = pb.CompletionRequest(
        prompt_token_ids=pb.TokenIds(ids=rendered.token_ids),
        logprobs=2,
        options=pb.CompletionOptions(**options),
    )
    completed = [message async for message in loaded.stub.Completion(request)]
    assert content(answer) == "".join(message.content for message in completed)
    assert [i for m in answer for i in m.token_ids] == tokens(completed)
    assert [e for m in answer for e in m.logprobs] == [e for m in completed for e in m.logprobs]
    last, expected = answer[-1], completed[-1]
    assert last.prompt_eval_count == len(rendered.token_ids)
    for name in ("done_reason", "stop_match", "prompt_eval_count", "eval_count"):
        assert getattr(last, name) == getattr(expected, name), name


async def test_the_last_message_accounts_for_all_tokens(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(reply=says("Hello!")))
    await server.load()
    messages = await read(chat(server))
    assert [message.done for message in messages] == [False] * (len(messages) - 1) + [True]
    assert content(messages) == "Hello!"
    last = messages[-1]
    assert last.done_reason == pb.DONE_REASON_STOP
    assert last.eval_count == 7 == sum(len(message.token_ids) for message in messages)
    assert last.HasField("queue_duration")
    assert last.HasField("prompt_eval_duration")
    assert last.HasField("eval_duration")


async def test_the_log_line_of_an_answer_has_its_counts(
    loaded: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, request_log.__name__)

    def lines() -> list[dict[str, Any]]:
        found = [record.msg for record in caplog.records if isinstance(record.msg, RequestLine)]
        return [line.fields for line in found if line.fields["method"] == "Chat"]

    await read(chat(loaded, num_predict=3, request_id="mine"))
    await eventually(lambda: bool(lines()))
    (fields,) = lines()
    assert fields["request_id"] == "mine"
    assert fields["model"] == "fake"
    assert fields["generated_tokens"] == 3
    assert fields["prompt_tokens"] == len("<user>hé<assistant>".encode())


async def test_a_constraint_reaches_the_engine_and_is_reported(loaded: Server) -> None:
    answer = await read(chat(loaded, num_predict=2, constraint=pb.Constraint(regex="[a-z]")))
    assert loaded.backend.grammars.compiled == [Constraint("regex", ("[a-z]",))]
    assert all(message.HasField("constraint_satisfied") == message.done for message in answer)
    assert answer[-1].constraint_satisfied
    assert not (await read(chat(loaded, num_predict=2)))[-1].HasField("constraint_satisfied")


async def test_an_answer_that_a_stop_string_cuts_is_judged_as_it_is_shown(
    start_server: StartServer,
) -> None:
    server = await start_server(FakeBackend(reply=says("bad!")))
    await server.load()
    answer = await read(chat(server, stop=["!"], constraint=pb.Constraint(regex="[a-z]")))
    assert answer[-1].HasField("constraint_satisfied")
    assert not answer[-1].constraint_satisfied


async def test_the_use_of_the_prefix_cache_is_that_of_the_request(loaded: Server) -> None:
    await read(chat(loaded, num_predict=1, cache_salt="me"))
    await read(chat(loaded, num_predict=1, bypass_prefix_cache=True))
    assert loaded.backend.policies == [
        CachePolicy(salt="me"),
        CachePolicy(reads=False, writes=False),
    ]


async def test_chosen_tokens_have_log_probabilities(loaded: Server) -> None:
    answer = await read(chat(loaded, num_predict=2, logprob_token_ids=[7, 3]))
    found = [entry for message in answer for entry in message.logprobs]
    assert [[each.token_id for each in entry.candidates] for entry in found] == [[7, 3]] * 2


async def test_a_message_has_the_progress_of_the_prefill() -> None:
    progress = pb.PromptProgress(evaluated_count=3, total_count=9)
    part = pb.CompletionResponse(prompt_progress=progress)
    message = await chat_message(part, OutputDelta(prefill=(3, 9)), Answer(AnswerFormat(), ""))
    assert message == pb.ChatResponse(prompt_progress=progress)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no message": ({"messages": []}, "messages"),
    "a wrong message": ({"messages": [pb.ChatMessage(content="x")]}, "messages[0].role"),
    "arguments that are no JSON": ({"chat_template_kwargs": "{"}, "chat_template_kwargs"),
    "an option out of range": ({"temperature": -1.0}, "options.temperature"),
    "too many log probabilities": ({"logprobs": 21}, "logprobs"),
    "a priority out of range": ({"priority": 101}, "priority"),
    "a long request id": ({"request_id": "x" * 129}, "request_id"),
    "a long salt": ({"cache_salt": "x" * 129}, "cache_salt"),
    "too many ids": ({"logprob_token_ids": [1] * 129}, "logprob_token_ids"),
    "an id outside the vocabulary": ({"logprob_token_ids": [999]}, "logprob_token_ids[0]"),
    "a constraint without a kind": ({"constraint": pb.Constraint()}, "constraint"),
    "an empty constraint": ({"constraint": pb.Constraint(regex="")}, "constraint.regex"),
    "a constraint without an end": (
        {"constraint": pb.Constraint(json_object=pb.JsonObject()), "ignore_eos": True},
        "options.ignore_eos",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_request_is_refused_by_its_field(loaded: Server, name: str) -> None:
    fields, field = WRONG[name]
    problem = await failure(chat(loaded, **fields))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {field}


async def test_wrong_options_and_a_wrong_conversation_are_named_at_once(loaded: Server) -> None:
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(content="x")],
        chat_template_kwargs="{",
        options=pb.CompletionOptions(temperature=-1),
        priority=101,
    )
    problem = await failure(loaded.stub.Chat(request))
    assert problem.reason == "INVALID_FIELD"
    assert set(problem.violations) == {
        *("messages[0].role", "chat_template_kwargs", "options.temperature", "priority"),
    }


async def test_a_long_conversation_is_refused_with_numbers(loaded: Server) -> None:
    message = pb.ChatMessage(role=pb.ROLE_USER, content="x" * CONTEXT_LENGTH)
    problem = await failure(chat(loaded, messages=[message]))
    assert problem.reason == "PROMPT_TOO_LONG"
    assert problem.metadata["contextLength"] == str(CONTEXT_LENGTH)
    assert int(problem.metadata["promptTokens"]) > CONTEXT_LENGTH


async def test_a_token_outside_the_vocabulary_is_refused(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(chat=chat_format("")))
    await server.load()
    problem = await failure(chat(server))
    assert problem.violations == {"messages": "the prompt has no tokens"}


async def test_cancelling_frees_the_slot(loaded: Server) -> None:
    call = chat(loaded)
    await call.read()
    call.cancel()
    await loaded.assert_nothing_left()


async def test_a_deadline_frees_the_slot(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.stub.Chat(pb.ChatRequest(messages=[HELLO]), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(call)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    loaded.backend.step_gate.open()
    await loaded.assert_nothing_left()


async def test_an_abort_ends_an_answer_by_its_request_id(loaded: Server) -> None:
    call = chat(loaded, request_id="me")
    await call.initial_metadata()
    answer = await loaded.stub.Abort(pb.AbortRequest(request_ids=["me"]))
    assert answer.aborted_count == 1
    assert (await failure(call)).reason == "ABORTED"


async def test_a_drain_refuses_answers(loaded: Server) -> None:
    await loaded.stub.Drain(pb.DrainRequest())
    assert (await failure(chat(loaded))).reason == "SHUTTING_DOWN"


async def test_a_higher_priority_goes_first(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    running = [chat(loaded, num_predict=1) for _ in range(4)]
    await eventually(lambda: len(loaded.view.requests) == 4)
    low = chat(loaded, num_predict=1, request_id="low")
    await eventually(lambda: len(loaded.view.requests) == 5)
    high = chat(loaded, num_predict=1, priority=50, request_id="high")
    await eventually(lambda: len(loaded.view.requests) == 6)
    order: list[str] = []

    async def follow(call: ChatCall, name: str) -> None:
        await read(call)
        order.append(name)

    loaded.backend.step_gate.open()
    await asyncio.gather(follow(low, "low"), follow(high, "high"), *map(read, running))
    assert sorted(order) == ["high", "low"]


async def test_a_model_without_a_template_says_so(start_server: StartServer) -> None:
    server = await start_server(FakeBackend())
    assert (await server.load()).model.capabilities.chat
    server = await start_server(FakeBackend(chat=chat_format("x", problem="unreadable")))
    model = (await server.load()).model
    assert model.capabilities.HasField("chat")
    assert not model.capabilities.chat
    assert (await failure(chat(server))).reason == "MODEL_UNSUPPORTED"
