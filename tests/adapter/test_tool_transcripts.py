"""Tool calls in all formats of mlx_lm: the same calls, however the text arrives."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.chat.answer import Answer, AnswerPart
from runner_server.chat.renderer import ChatRenderer
from runner_server.mlx_backend.upstream.answer_markers import answer_format
from support.conversations import CLOCK, WEATHER

TOOLS = [WEATHER, CLOCK]
PLACE = {"place": 'Zürich "<b>" 日本', "days": 2}
ONE = [("get_weather", PLACE)]
TWO = [*ONE, ("get_time", {})]
TEXT = PLACE["place"]
OBJECT = json.dumps(PLACE, ensure_ascii=False)
HEADER = "<|channel|>commentary "
"""The header of a call of gpt-oss up to its recipient, which is left out like other headers."""

TRANSCRIPTS: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "json_tools": (
        (
            f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {OBJECT}}}\n'
            '</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
        ),
        "I look.\n\n",
        TWO,
    ),
    "mistral": (
        (
            f'Ok.[TOOL_CALLS][{{"name": "get_weather", "arguments": {OBJECT}, "id": "abc123def"}}, '
            '{"name": "get_time", "arguments": {}}]'
        ),
        "Ok.",
        TWO,
    ),
    "qwen3_coder": (
        (
            f"<tool_call>\n<function=get_weather>\n<parameter=place>\n{TEXT}\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
        ),
        "",
        ONE,
    ),
    "kimi_k2": (
        (
            "Ok<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            f"<|tool_call_argument_begin|>{OBJECT}<|tool_call_end|><|tool_call_begin|>"
            "functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>"
        ),
        "Ok",
        TWO,
    ),
    "kimi_k3": (
        (
            '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
            f'<|open|>argument key="place" type="string"<|sep|>{TEXT}<|close|>argument<|sep|>'
            '<|open|>argument key="days" type="integer"<|sep|>2<|close|>argument<|sep|>'
            "<|close|>call<|sep|><|close|>tools<|sep|>"
        ),
        "",
        ONE,
    ),
    "glm47": (
        (
            f"Hm <tool_call>get_weather\n<arg_key>place</arg_key>\n<arg_value>{TEXT}</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        ),
        "Hm ",
        ONE,
    ),
    "laguna": (
        (
            f"<tool_call>get_weather\n<arg_key>place</arg_key>\n<arg_value>{TEXT}</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        ),
        "\n",
        ONE,
    ),
    "longcat": (
        (
            f"<longcat_tool_call>get_weather\n<longcat_arg_key>place</longcat_arg_key>\n"
            f"<longcat_arg_value>{TEXT}</longcat_arg_value>\n<longcat_arg_key>days</longcat_arg_key>\n"
            "<longcat_arg_value>2</longcat_arg_value>\n</longcat_tool_call>"
        ),
        "",
        ONE,
    ),
    "minicpm5": (
        (
            f'<function name="get_weather"><param name="place"><![CDATA[{TEXT}]]></param>'
            '<param name="days">2</param></function><function name="get_time"></function>'
        ),
        "",
        TWO,
    ),
    "minimax_m2": (
        (
            f'<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="place">{TEXT}'
            '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n'
            '<invoke name="get_time">\n</invoke>\n</minimax:tool_call>'
        ),
        "",
        TWO,
    ),
    "muse_spark": (
        (
            f'<atem:function_calls>\n<atem:invoke name="get_weather">\n'
            f'<atem:parameter name="place">{TEXT}</atem:parameter>\n'
            '<atem:parameter name="days">2</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
        ),
        "",
        ONE,
    ),
    "pythonic": (
        f"<|tool_call_start|>[get_weather(place={TEXT!r}, days=2), get_time()]<|tool_call_end|>.",
        ".",
        TWO,
    ),
    "function_gemma": (
        (
            f"<start_function_call>call:get_weather{{place:<escape>{TEXT}<escape>,days:2}}"
            "<end_function_call>"
        ),
        "",
        ONE,
    ),
    "gpt_oss": (
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
            f"{OBJECT}<|call|><|start|>assistant to=functions.get_time<|channel|>commentary"
            "<|message|>{}"
        ),
        "I look.",
        TWO,
    ),
    "gemma4": (
        f'So <|tool_call>call:get_weather{{place:<|"|>{TEXT}<|"|>,days:2}}<tool_call|>',
        "So ",
        ONE,
    ),
}


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    """The process that parses calls."""
    renderer = ChatRenderer(cpu_seconds=0.5)
    yield renderer
    renderer.close()


async def read(
    renderer: ChatRenderer, parser: str, pieces: Sequence[str], *, at_once: bool = False
) -> AnswerPart:
    """Return an answer whose text arrives in pieces, each a token, one by one or all at once."""
    format_ = answer_format(lambda _: False, {"tool_parser_type": parser}, {}, "")
    parse = partial(renderer.parse_calls, format_.tool_parser, TOOLS)
    answer = Answer(format_, "", parse)
    if at_once:
        return await answer.add(pieces, is_last=True)
    parts = [await answer.add([piece], is_last=False) for piece in pieces]
    parts.append(await answer.add([], is_last=True))
    assert answer.has_calls == any(part.tool_calls for part in parts)
    return AnswerPart(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.tool_calls),
    )


def pieces_of(text: str, seed: int) -> list[str]:
    """Cut a text into pieces of random length."""
    draw, pieces = random.Random(seed), []  # noqa: S311 - pseudo-random cuts
    while text:
        size = draw.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("parser", TRANSCRIPTS)
async def test_calls_do_not_depend_on_the_pieces(renderer: ChatRenderer, parser: str) -> None:
    text, content, calls = TRANSCRIPTS[parser]
    whole = await read(renderer, parser, [text])
    assert whole.content == content
    assert [(call.name, json.loads(call.arguments)) for call in whole.tool_calls] == calls
    ways = [list(text), *(pieces_of(text, seed) for seed in range(4))]
    for pieces in ways:
        assert await read(renderer, parser, pieces) == whole
        assert await read(renderer, parser, pieces, at_once=True) == whole


@pytest.mark.parametrize("parser", TRANSCRIPTS)
async def test_a_call_that_is_cut_off_is_never_half_a_call(
    renderer: ChatRenderer, parser: str
) -> None:
    text, _, calls = TRANSCRIPTS[parser]
    marker, _ = answer_format(lambda _: False, {"tool_parser_type": parser}, {}, "").call_markers
    start = text.index(marker)
    before = (await read(renderer, parser, [text[:start]])).content
    begin = start + len(marker)
    for size in range(begin, len(text), 7):
        part = await read(renderer, parser, [text[:size]])
        for call in part.tool_calls:
            assert isinstance(json.loads(call.arguments), dict)
        if not part.tool_calls:
            # Nothing is lost.
            assert part.content == before.removesuffix(HEADER) + text[start:size]
        assert len(part.tool_calls) <= len(calls)


BROKEN: dict[str, str] = {
    "no JSON": "<tool_call>{</tool_call>",
    "no object": "<tool_call>[1, 2]</tool_call>",
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "a number as a name": '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    "arguments that are no object": '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    "arguments beyond JSON": '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    "half a character": '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
    "nothing": "<tool_call></tool_call>",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_call_is_content(renderer: ChatRenderer, name: str) -> None:
    text = f"a {BROKEN[name]} b"
    assert await read(renderer, "json_tools", list(text)) == AnswerPart(text)


async def test_arguments_may_be_written_as_text(renderer: ChatRenderer) -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>'
    (call,) = (await read(renderer, "json_tools", [text])).tool_calls
    assert json.loads(call.arguments) == {"x": 1}


async def test_the_models_own_ids_are_kept(renderer: ChatRenderer) -> None:
    for parser, ids in (("mistral", ["abc123def", ""]), ("kimi_k2", ["functions.get_weather:0"])):
        calls = (await read(renderer, parser, [TRANSCRIPTS[parser][0]])).tool_calls
        assert [call.id for call in calls][: len(ids)] == ids


async def test_a_text_that_is_slow_to_parse_is_content(renderer: ChatRenderer) -> None:
    # A hundred thousand unclosed brackets, for which Python's own parser takes long or gives up.
    text = f"<|tool_call_start|>[f(x={'[' * 100_000})]<|tool_call_end|>"
    part = await read(renderer, "pythonic", [text])
    assert part.content == text or part.tool_calls
    good = TRANSCRIPTS["json_tools"][0]
    parts = await asyncio.gather(*(read(renderer, "json_tools", [good]) for _ in range(3)))
    assert all(len(part.tool_calls) == 2 for part in parts)
