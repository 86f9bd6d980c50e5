"""Answers of gpt-oss: channels come apart, and constraints begin after the reasoning."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat import gpt_oss
from runner_server.chat.answer import Answer, AnswerPart
from runner_server.chat.renderer import ChatRenderer
from support.chat_answers import Answered, answer
from support.chat_models import PADDED, add_chat, serving
from support.harness import Server
from support.models import VOCAB_SIZE

pytestmark = pytest.mark.asyncio(loop_scope="module")

Build = Callable[..., Path]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)
TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"]
"""Special tokens, with the ids from ``VOCAB_SIZE`` on."""
END, EOS = VOCAB_SIZE + 1, 0
THINK = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CHOICE = pb.Constraint(choice=pb.Choice(texts=["left", "right"]))
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'

ANSWERS: dict[str, tuple[str, AnswerPart]] = {
    "reasoning and content": (f"{THINK}So.{NEXT}{FINAL}Left", AnswerPart("Left", "So.")),
    "content alone": (f"{FINAL}Left", AnswerPart("Left")),
    "content of a type": ("<|channel|>final <|constrain|>json<|message|>{}", AnswerPart("{}")),
    "a preamble": (
        f"{THINK}a{NEXT}<|channel|>commentary<|message|>I look.{NEXT}{THINK}b{NEXT}{FINAL} Left",
        AnswerPart("I look. Left", "ab"),
    ),
    "reasoning that is cut off": (f"{THINK}So", AnswerPart(reasoning="So")),
    "a marker that is text": (f"{FINAL}Not the <|end|>?", AnswerPart("Not the <|end|>?")),
    "no channels": ("Left, I think.", AnswerPart("Left, I think.")),
    "no channels in the second message": (f"{THINK}So{NEXT} Left", AnswerPart(" Left", "So")),
    "nothing": ("", AnswerPart()),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_channels_come_apart_however_the_text_arrives(name: str) -> None:
    text, expected = ANSWERS[name]
    for size in (1, 2, 7, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert await read(pieces) == expected


async def read(pieces: Sequence[str], parse: Any = None) -> AnswerPart:
    """Return an answer that arrives in pieces."""
    answer = Answer(gpt_oss.FORMAT, "<|start|>assistant", *([parse] if parse else []))
    parts = [await answer.add([piece], is_last=False) for piece in pieces]
    parts.append(await answer.add([], is_last=True))
    return AnswerPart(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.tool_calls),
    )


CALLS = {
    "after the channel": CALL,
    "before the channel": ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}',
    "in the reasoning's channel": '<|channel|>analysis to=functions.f code<|message|>{"x": 1}',
    "with an end": f"{CALL}<|call|>",
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_recipient_may_be_anywhere_in_the_header(name: str) -> None:
    renderer = ChatRenderer()
    try:
        parse = partial(renderer.parse_calls, gpt_oss.FORMAT.tool_parser, ())
        found = await read([*f"{THINK}So.{NEXT}{CALLS[name]}"], parse)
    finally:
        renderer.close()
    assert (found.content, found.reasoning) == ("", "So.")
    ((called, arguments),) = [(call.name, call.arguments) for call in found.tool_calls]
    assert (called, json.loads(arguments)) == ("f", {"x": 1})


async def test_a_marker_within_arguments_ends_no_required_call() -> None:
    renderer = ChatRenderer()
    text = CALL.replace("1}", f'"<|call|>{FINAL}"}}')
    try:
        parse = partial(renderer.parse_calls, gpt_oss.FORMAT.tool_parser, ())
        answer = Answer(gpt_oss.FORMAT, "", parse, required=["f"])
        parts = [await answer.add([char], is_last=False) for char in text]
        parts.append(await answer.add([], is_last=True))
    finally:
        renderer.close()
    ((called,),) = [part.tool_calls for part in parts if part.tool_calls]
    assert json.loads(called.arguments) == {"x": f"<|call|>{FINAL}"}
    assert not any(part.content for part in parts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channeled(
    module_socket_dir: Path, model_dir: Build, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A server with a model that answers in channels, as its template says."""
    path = tmp_path_factory.mktemp("channeled") / "model"
    model = add_chat(model_dir(**PADDED), path, TOKENS, special=True, template=TEMPLATE)
    async with serving(module_socket_dir, model) as server:
        yield server


async def ask(server: Server, bias: dict[int, float] | None = None, **fields: Any) -> Answered:
    """Return an answer of up to 200 tokens, drawn with a seed."""
    return await answer(
        server, bias, **{"num_predict": 200, "seed": 1, "temperature": 2.0} | fields
    )


async def text_of(server: Server, ids: Sequence[int]) -> str:
    """Return the text of tokens, without the one that ends the text."""
    shown = [id_ for id_ in ids if id_ != EOS]
    return (await server.stub.Detokenize(pb.DetokenizeRequest(token_ids=shown))).content


async def length_of(server: Server, text: str) -> int:
    """Return the number of a text's tokens."""
    return len((await server.stub.Tokenize(pb.TokenizeRequest(content=text))).token_ids)


@pytest.mark.mlx
async def test_the_capabilities_are_those_of_the_template(channeled: Server) -> None:
    capabilities = (await channeled.status()).model.capabilities
    assert capabilities.reasoning
    assert capabilities.tools
    assert capabilities.required_tools


@pytest.mark.mlx
@pytest.mark.parametrize("budget", [0, 1, 9])
async def test_a_constraint_begins_after_reasoning_of_limited_length(
    channeled: Server, budget: int
) -> None:
    # The end of the text and of the reasoning would be drawn at once, and must not be.
    bias = {EOS: 100.0, END: -100.0}
    found = await ask(channeled, bias, constraint=CHOICE, reasoning_budget=budget)
    assert found.content in ("left", "right")
    assert found.last.constraint_satisfied
    assert found.last.done_reason == pb.DONE_REASON_STOP
    text = await text_of(channeled, found.ids)
    assert text == f"{THINK}{found.reasoning}{NEXT}{FINAL}{found.content}"
    assert bool(found.reasoning) == (budget > 0)
    count = 1 + budget + await length_of(channeled, NEXT)
    assert found.last.reasoning_eval_count == count


@pytest.mark.mlx
async def test_a_constraint_begins_when_the_model_ends_its_reasoning(channeled: Server) -> None:
    found = await ask(channeled, {END: 6.0}, constraint=CHOICE)
    assert found.content in ("left", "right")
    assert found.ids.count(END) == 1
    assert found.reasoning
    count = await length_of(channeled, THINK) + 1
    cut = await ask(channeled, {END: -9.0}, constraint=CHOICE, num_predict=count)
    assert (cut.content, cut.last.constraint_satisfied) == ("", False)


@pytest.mark.mlx
async def test_a_stop_string_is_judged_without_reasoning_and_headers(channeled: Server) -> None:
    fields: dict[str, Any] = {"constraint": pb.Constraint(regex="[1-4]{2}(;[1-4]{2})*")}
    bias = {EOS: -100.0}
    cut = await ask(channeled, bias, stop=[";"], reasoning_budget=2, **fields)
    assert (cut.last.stop_match, cut.last.constraint_satisfied) == (";", True)
    assert len(cut.content) == 2


@pytest.mark.mlx
@pytest.mark.parametrize("constraint", [None, CHOICE], ids=["any text", "a constraint"])
async def test_a_template_may_open_the_reasoning(
    socket_dir: Path, model_dir: Build, tmp_path: Path, constraint: pb.Constraint | None
) -> None:
    source, path = model_dir(**PADDED), tmp_path / "model"
    model = add_chat(source, path, TOKENS, special=True, template=TEMPLATE + THINK)
    async with serving(socket_dir, model) as server:
        bias = {EOS: -100.0, END: -100.0}
        found = await ask(server, bias, reasoning_budget=3, constraint=constraint, num_predict=60)
        end = (await server.stub.Tokenize(pb.TokenizeRequest(content=NEXT))).token_ids
        assert found.ids[3 : 3 + len(end)] == end
        assert found.last.reasoning_eval_count == 3 + len(end)
        assert found.reasoning == await text_of(server, found.ids[:3])
        assert bool(constraint) == (found.content in ("left", "right"))


@pytest.mark.mlx
async def test_a_template_may_open_the_content(
    socket_dir: Path, model_dir: Build, tmp_path: Path
) -> None:
    source, path = model_dir(**PADDED), tmp_path / "model"
    model = add_chat(source, path, TOKENS, special=True, template=TEMPLATE + FINAL)
    async with serving(socket_dir, model) as server:
        found = await ask(server, constraint=CHOICE, reasoning_budget=9)
        assert found.content in ("left", "right")
        assert await text_of(server, found.ids) == found.content
        assert found.last.constraint_satisfied


@pytest.mark.mlx
async def test_a_batch_gives_the_answers_of_rows_alone(channeled: Server) -> None:
    rows: list[dict[str, Any]] = [
        {"constraint": CHOICE, "reasoning_budget": 7, "seed": 1},
        {"constraint": CHOICE, "reasoning_budget": 0, "seed": 2},
        {"reasoning_budget": 3, "seed": 3, "num_predict": 20},
    ]
    alone = [(await ask(channeled, **row)).ids for row in rows]
    together = await asyncio.gather(*(ask(channeled, **row) for row in rows))
    assert [found.ids for found in together] == alone
