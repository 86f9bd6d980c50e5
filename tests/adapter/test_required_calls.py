"""Required calls of tools, from the request to the parsed call, with real models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.format import JSON_CALLS
from support.chat_models import PADDED, add_chat, serving
from support.harness import Server, failure
from support.models import VOCAB_SIZE
from support.sweeps import sampled

pytestmark = [pytest.mark.mlx, pytest.mark.asyncio(loop_scope="module")]

Build = Callable[..., Path]
EOS = 0
HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="Which way?")
THINK = ["<think>", "</think>"]
SCHEMAS: dict[str, dict[str, Any]] = {
    "turn": {
        "type": "object",
        "properties": {
            "way": {"enum": ["left", "right", 'é "</tool_call>" \\n']},
            "by": {"$ref": "#/$defs/angle"},
        },
        "required": ["way", "by"],
        "additionalProperties": False,
        "$defs": {"angle": {"type": "integer", "minimum": -3, "maximum": 90}},
    },
    "say-it": {
        "properties": {
            "words": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2}
        },
        "required": ["words"],
        "additionalProperties": False,
    },
    "stop": {},
}
TOOLS = [
    pb.Tool(name=name, parameters=json.dumps(schema) if schema else "")
    for name, schema in SCHEMAS.items()
]
KIMI = [
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_end|>", "<|tool_call_argument_begin|>"),
]
OSS = ["<|channel|>", "<|end|>", "<|start|>", "<|message|>", "<|constrain|>", "<|call|>"]
FORMS: dict[str, tuple[str, list[str], bool]] = {
    "json_tools": ("json_tools", [*THINK, "<tool_call>", "</tool_call>"], False),
    "json_tools without tokens": ("json_tools", THINK, False),
    "json_tools of special tokens": ("json_tools", [*THINK, "<tool_call>", "</tool_call>"], True),
    "mistral": ("mistral", [*THINK, "[TOOL_CALLS]"], True),
    "mistral with names": ("mistral", [*THINK, "[TOOL_CALLS]", "[ARGS]"], True),
    "kimi_k2": ("kimi_k2", [*THINK, *KIMI], True),
    "gpt_oss": ("gpt_oss", OSS, True),
}
SAMPLE = {"json_tools", "mistral with names", "gpt_oss"}


@pytest_asyncio.fixture(params=sampled(FORMS, SAMPLE), scope="module", loop_scope="module")
async def calling(
    request: pytest.FixtureRequest,
    module_socket_dir: Path,
    model_dir: Build,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Server]:
    """A server with a model that calls tools in one of the forms."""
    parser, tokens, special = FORMS[request.param]
    path = tmp_path_factory.mktemp("calling") / "model"
    model = add_chat(model_dir(**PADDED), path, tokens, special=special, parser=parser)
    async with serving(module_socket_dir, model, context_length=2048) as server:
        yield server


async def test_every_form_is_tested() -> None:
    # The form of longcat, which is that of json_tools, is tested with the forms without JSON.
    assert {"longcat", *(form for form, _, _ in FORMS.values())} == set(JSON_CALLS)


async def answer(server: Server, **fields: Any) -> list[pb.ChatResponse]:
    """Return the messages of an answer that must call tools."""
    names = pb.CompletionOptions.DESCRIPTOR.fields_by_name
    options = {name: fields.pop(name) for name in list(fields) if name in names}
    # Short, because a model that always reasons writes nothing else here.
    fields.setdefault("reasoning_budget", 4)
    # Hot, because the model's own preferences are as good as any.
    options = {"num_predict": 800, "temperature": 8.0, **options}
    # Ends the text as soon as it may end, and does not reason.
    options.setdefault("logit_bias", {EOS: 100.0, VOCAB_SIZE: -100.0})
    fields.setdefault("tools", TOOLS)
    request = pb.ChatRequest(
        messages=[HELLO],
        tool_choice=pb.TOOL_CHOICE_REQUIRED,
        options=pb.CompletionOptions(**options),
        **fields,
    )
    return [message async for message in server.stub.Chat(request)]


def calls_of(messages: list[pb.ChatResponse]) -> list[tuple[str, Any]]:
    """Return the calls of a finished answer, which are valid and all that it has."""
    last = messages[-1]
    calls = [call for message in messages for call in message.tool_calls]
    content = "".join(message.content for message in messages)
    found = last.done_reason, last.constraint_satisfied, content.strip()
    assert found == (pb.DONE_REASON_TOOL_CALLS, True, "")
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), {"type": "object", **SCHEMAS[call.name]})
    return [(call.name, json.loads(call.arguments)) for call in calls]


async def test_an_answer_is_valid_calls(calling: Server) -> None:
    assert (await calling.status()).model.capabilities.required_tools
    asked = (answer(calling, seed=seed, tools=TOOLS[:2]) for seed in range(8))
    names = {name for messages in await asyncio.gather(*asked) for name, _ in calls_of(messages)}
    assert len(names) > 1


async def test_one_tool_is_called_by_name(calling: Server) -> None:
    named = ["turn", "say-it"] * 2
    asked = (answer(calling, seed=seed, tool_name=name) for seed, name in enumerate(named))
    for name, messages in zip(named, await asyncio.gather(*asked), strict=True):
        assert {called for called, _ in calls_of(messages)} == {name}


async def test_calls_may_follow_one_another(calling: Server) -> None:
    # A text that does not want to end.
    bias = {EOS: -60.0, VOCAB_SIZE: -60.0}
    messages = await answer(calling, seed=1, tool_name="turn", logit_bias=bias, num_predict=300)
    if messages[-1].done_reason == pb.DONE_REASON_TOOL_CALLS:
        # Nothing can follow the end of a list of calls.
        calls_of(messages)
        return
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH
    calls = [call for message in messages for call in message.tool_calls]
    state = calling.app.engine.state()
    assert state.model
    # Without a marker after each of them, calls come at the end of the answer.
    if state.model.chat.answer.call_form == "json_tools":
        assert len(calls) > 1


async def markers_of(server: Server) -> list[list[int]]:
    """Return the tokens of the markers before and after reasoning."""
    state = server.app.engine.state()
    assert state.model
    form = state.model.chat.answer
    requests = [pb.TokenizeRequest(content=text) for text in (form.think_start, form.think_end)]
    return [[*(await server.stub.Tokenize(request)).token_ids] for request in requests]


async def test_calls_begin_after_the_reasoning(calling: Server) -> None:
    begin, end = await markers_of(calling)
    bias = {EOS: 100.0, begin[0]: 100.0}
    messages = await answer(calling, seed=2, logit_bias=bias, reasoning_budget=6, tools=TOOLS[:2])
    ids = [id_ for message in messages for id_ in message.token_ids]
    assert ids[: len(begin)] == begin
    assert ids[len(begin) + 6 :][: len(end)] == end
    assert messages[-1].reasoning_eval_count == 1 + 6 + len(end)
    assert "".join(message.reasoning for message in messages)
    calls_of(messages)


async def test_a_batch_gives_the_calls_of_rows_alone(calling: Server) -> None:
    def parts(messages: list[pb.ChatResponse]) -> tuple[object, ...]:
        return calls_of(messages), [id_ for message in messages for id_ in message.token_ids]

    def ask(seed: int) -> Any:
        return answer(calling, seed=seed, tools=TOOLS[:2])

    alone = [parts(await ask(seed)) for seed in range(3)]
    together = await asyncio.gather(*(ask(seed) for seed in range(3)))
    assert [parts(messages) for messages in together] == alone


async def test_calls_that_are_cut_off_are_not_satisfied(calling: Server) -> None:
    last = (await answer(calling, num_predict=2))[-1]
    assert last.done_reason == pb.DONE_REASON_LENGTH
    assert last.HasField("constraint_satisfied")
    assert not last.constraint_satisfied


async def test_a_schema_that_cannot_be_used_is_refused_by_its_place(calling: Server) -> None:
    bad = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    tools = [*TOOLS, pb.Tool(name="bad", parameters=json.dumps(bad))]
    request = pb.ChatRequest(messages=[HELLO], tools=tools, tool_choice=pb.TOOL_CHOICE_REQUIRED)
    problem = await failure(calling.stub.Chat(request))
    assert problem.violations == {
        "tools[3].parameters": "at #/properties/x: not supported: uniqueItems"
    }
    # Another tool may be required, and no call at all.
    calls_of(await answer(calling, tools=tools, tool_name="turn"))
    request.tool_choice, request.options.num_predict = pb.TOOL_CHOICE_AUTO, 1
    assert [message async for message in calling.stub.Chat(request)][-1].done


async def test_arguments_are_an_object(calling: Server) -> None:
    for kind in ('"string"', '["string", "null"]'):
        tool = pb.Tool(name="f", parameters=f'{{"type": {kind}}}')
        request = pb.ChatRequest(
            messages=[HELLO], tools=[tool], tool_choice=pb.TOOL_CHOICE_REQUIRED
        )
        problem = await failure(calling.stub.Chat(request))
        assert set(problem.violations) == {"tools[0].parameters"}
        assert "at #/type" in problem.violations["tools[0].parameters"]
