"""Required calls without JSON arguments: all texts of the grammar read back as valid calls."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.answer import Answer, ToolCall
from runner_server.chat.format import FLAT_CALLS, AnswerFormat
from runner_server.chat.renderer import ChatRenderer
from runner_server.engine.types import TOOL_CALLS, Constraint
from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints.flat_forms import FORMS
from runner_server.mlx_backend.constraints.grammars import GrammarCache
from runner_server.mlx_backend.tokenizer.codec import FastCodec
from runner_server.mlx_backend.upstream.answer_markers import answer_format
from support.chat_models import PADDED, add_chat, serving
from support.sweeps import sampled
from support.tokenizer_files import byte_level

Build = Callable[..., Path]
END_OF_TEXT = 3
TURN = {
    "type": "object",
    "properties": {
        "way": {"type": "string", "description": "Any text."},
        "by": {"type": "integer", "minimum": -3, "maximum": 90},
        "count": {"type": "integer"},
        "speed": {"type": "number", "minimum": -1e6, "exclusiveMaximum": 1e6},
        "side": {"type": "string", "enum": ["left", "far right", "é"]},
        "sure": {"type": "boolean", "default": True},
        "then": {"type": "string"},
    },
    "required": ["by", "then"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "turn": TURN,
    "say": {"properties": {"words": {"type": "string"}}},
    "stop": {},
}
NULL = {"type": "null"}
TEXTS = {"type": "array", "items": {"type": "string"}}
LISTS: dict[str, dict[str, Any]] = {
    "names": {**TEXTS, "minItems": 1, "maxItems": 3},
    "sides": {"type": "array", "items": {"type": "string", "enum": ["left", "far right"]}},
    "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
    "rows": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}},
    "others": {"anyOf": [TEXTS, NULL], "default": None},
}
"""Arguments that are lists."""

OTHERS: dict[str, dict[str, Any]] = {
    "note": {"anyOf": [{"type": "string"}, NULL], "default": None},
    "side": {"anyOf": [NULL, {"type": "string", "enum": ["left", "far right"]}]},
    "tag": {"type": ["string", "null"], "title": "Tag"},
    "kind": {"type": ["null", "string"], "enum": ["a", "b c", None]},
    "size": {"type": ["integer", "null"], "maximum": 9},
    "sure": {"type": ["boolean", "null"]},
    "speed": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, NULL]},
    "word": {"type": ["string"]},
}
"""Arguments that may be null."""


def schemas_of(form: str) -> dict[str, dict[str, Any]]:
    """Return the schemas of tools that a form can call."""
    found = {**OTHERS, **LISTS}
    if form == "qwen3_coder":
        del found["speed"]
    if form == "function_gemma":
        found = OTHERS
    return {**SCHEMAS, "more": {"properties": found, "required": [*found][::2]}}


XTML = ["<|close|>", "<|open|>", "<|sep|>", "<|end_of_msg|>"]
TRAPS = [
    *(
        "null",
        "NULL",
        "none",
        "nil",
        "True",
        "5",
        "[1]",
        "{",
        "\x1c",
        "\n",
        " ",
        "]]>",
        "<![CDATA[",
        "<",
        "}",
        '"',
        "'",
        "\\",
        ",",
        "\x00",
        "\r",
    ),
    *("</function>", "</tool_call>", "<tool_call>", "<function=f>", "</invoke>", "</param>"),
    *("</parameter>", "</arg_value>", "<arg_key>", "<escape>", '<|"|>', "<tool_call|>"),
    *("<end_function_call>", "<|tool_call_end|>", "</minimax:tool_call>", ")]", "\u2028"),
    *("<|open|>", "<|close|>", "<|sep|>", "json", "call", "tools", "argument", "{}"),
]
"""Texts that a form could mistake for its own, each a token."""


def test_the_forms_are_those_that_can_be_required() -> None:
    assert set(FORMS) == set(FLAT_CALLS)


def format_of(form: str) -> AnswerFormat:
    """Return the answer format of a form of calls."""
    return answer_format(lambda _: False, {"tool_parser_type": form}, {}, "")


def constraint_of(form: str, schemas: dict[str, dict[str, Any]]) -> Constraint:
    """Return the constraint of an answer that must call tools."""
    texts = [form, *format_of(form).call_markers]
    for i, (name, schema) in enumerate(schemas.items()):
        texts += [f"tools[{i}].parameters", name, json.dumps(schema)]
    return Constraint(TOOL_CALLS, tuple(texts))


@pytest.fixture(params=[False, True], ids=["texts", "special tokens"])
def codec(request: pytest.FixtureRequest) -> FastCodec:
    """A tokenizer with a token for each trap; the quotes of texts may be special tokens."""
    from tokenizers import AddedToken

    tokenizer = byte_level()
    quotes = sorted({form.quotes[1] for form in FORMS.values()} - {'"'})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*quotes, *TRAPS]])
    if request.param:
        tokenizer.add_special_tokens(quotes)
    return FastCodec(tokenizer, [], None)


def written(codec: FastCodec, constraint: Constraint, seed: int) -> str:
    """Return a text of a constraint, of random tokens that are often traps."""
    draw = random.Random(seed)  # noqa: S311 - pseudo-random texts
    grammar = GrammarCache(codec, codec.vocab_size, [END_OF_TEXT]).compile(constraint).result()
    matcher: Any = grammar.start()
    first_trap = min(codec.encode(text, as_prompt=False)[0] for text in TRAPS[-1:])
    ids: list[int] = []
    while True:
        mask = matcher.inner.compute_bitmask()
        allowed = [id_ for id_ in range(codec.vocab_size) if mask[id_ // 8] >> id_ % 8 & 1]
        assert allowed, matcher.failure
        if END_OF_TEXT in allowed and draw.random() < 0.7:
            return str(codec.decode(ids))
        allowed = [id_ for id_ in allowed if id_ != END_OF_TEXT] or allowed
        traps = [id_ for id_ in allowed if id_ >= first_trap - len(TRAPS)]
        id_ = draw.choice(traps if traps and draw.random() < 0.7 else allowed)
        ids.append(id_)
        matcher.consume(id_)
        assert not matcher.failure


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    """The process that parses calls."""
    renderer = ChatRenderer()
    yield renderer
    renderer.close()


async def read(renderer: ChatRenderer, form: str, text: str) -> tuple[ToolCall, ...]:
    """Return the calls of an answer, which has nothing else."""
    format_, schemas = format_of(form), schemas_of(form)
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in schemas.items()
    ]
    parse = partial(renderer.parse_calls, format_.tool_parser, tools)
    part = await Answer(format_, "", parse, required=[*schemas]).add([*text], is_last=True)
    assert (part.content.strip(), part.reasoning) == ("", ""), text
    return part.tool_calls


@pytest.mark.parametrize("form", sampled(FORMS, [*FORMS][::2]))
async def test_all_texts_of_the_grammar_read_back_as_valid_calls(
    renderer: ChatRenderer, codec: FastCodec, form: str
) -> None:
    schemas = schemas_of(form)
    constraint = constraint_of(form, schemas)
    for seed in range(3):
        text = written(codec, constraint, seed)
        calls = await read(renderer, form, text)
        assert calls, text
        assert len(calls) == text.count(format_of(form).call_markers[1]), text
        for call in calls:
            schema = {"type": "object", **schemas[call.name]}
            jsonschema.validate(json.loads(call.arguments), schema)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an object": ({"x": {"type": "object"}}, "at #/properties/x: not supported: "),
    "any list": ({"x": {"type": "array", "items": {}}}, "at #/properties/x/items: not supported: "),
    "a list of objects": (
        {"x": {"type": "array", "items": {"type": "object"}}},
        "at #/properties/x/items: not supported: ",
    ),
    "a list of different values": (
        {"x": {**TEXTS, "uniqueItems": True}},
        "at #/properties/x: not supported in this model's calls: uniqueItems",
    ),
    "a list of texts by a pattern": (
        {"x": {"type": "array", "items": {"type": "string", "pattern": "a"}}},
        "at #/properties/x/items: not supported in this model's calls: pattern",
    ),
    "any value": ({"x": {}}, "at #/properties/x: not supported: "),
    "several types": ({"x": {"type": ["string", "integer"]}}, "at #/properties/x: not supported: "),
    "several parts": (
        {"x": {"anyOf": [{"type": "string"}, {"type": "integer"}, NULL]}},
        "at #/properties/x: not supported: ",
    ),
    "a pattern": (
        {"x": {"type": "string", "pattern": "a"}},
        "at #/properties/x: not supported in this model's calls: pattern",
    ),
    "a text that is read as null": (
        {"x": {"type": "string", "enum": ["a", "null"]}},
        'at #/properties/x: this model\'s calls cannot write "null"',
    ),
    "a text with a marker": (
        {"x": {"type": "string", "const": "<b>"}},
        'at #/properties/x: this model\'s calls cannot write "<b>"',
    ),
    "no text": ({"x": {"type": "string", "enum": []}}, "at #/properties/x: enum is not an array"),
    "a name": (
        {"x y": {"type": "string"}},
        "at #/properties: this model's calls cannot write the name 'x y'",
    ),
    "a keyword of numbers": (
        {"x": {"type": "number", "not": {"const": 1}}},
        "at #/properties/x: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", ["gemma4", "pythonic", "qwen3_coder"])
def test_a_schema_is_refused_by_its_place(form: str, name: str) -> None:
    properties, words = REFUSED[name]
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}, **properties}}
    constraint = constraint_of(form, {"stop": {}, "f": schema})
    assert_refused(constraint, "tools[1].parameters", words)


OF_FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a list": ("function_gemma", TEXTS, "not supported: this model's calls have no lists"),
    "lists of texts": (
        "gemma4",
        {"type": "array", "items": TEXTS},
        "not supported: ",
    ),
    "no list": ("pythonic", {**TEXTS, "minItems": 3, "maxItems": 2}, "minItems to maxItems"),
    "a number read as a text": (
        "qwen3_coder",
        {"anyOf": [{"type": "number"}, NULL]},
        'this model\'s calls cannot be read with null in this way; use "type": ["number", "null"]',
    ),
    "a list read as a literal": (
        "qwen3_coder",
        {**TEXTS, "type": ["array", "null"]},
        "this model's calls cannot be read with null in this way; use anyOf",
    ),
    "a text read as null": (
        "minimax_m2",
        {"type": ["string", "null"], "enum": ["a", "None", None]},
        'this model\'s calls cannot write "None" with null',
    ),
}
"""Arguments that one form cannot write or read, and others can."""


@pytest.mark.parametrize("name", OF_FORMS)
def test_an_argument_is_refused_by_the_form(name: str) -> None:
    form, argument, words = OF_FORMS[name]
    place = "#/properties/x/items/items" if name == "lists of texts" else "#/properties/x"
    constraint = constraint_of(form, {"f": {"properties": {"x": argument}}})
    assert_refused(constraint, "tools[0].parameters", f"at {place}: {words}")


def assert_refused(constraint: Constraint, field: str, words: str) -> None:
    codec = FastCodec(byte_level(), [], None)
    future = GrammarCache(codec, codec.vocab_size, [END_OF_TEXT]).compile(constraint)
    with pytest.raises(InvalidField) as refused:
        future.result()
    ((at, problem),) = refused.value.violations
    assert at == field
    assert problem.startswith(words)


def test_the_shape_of_a_schema_is_refused_by_its_place() -> None:
    required = {"properties": {}, "required": ["y"]}
    assert_refused(
        constraint_of("glm47", {"f": required}), "tools[0].parameters", "at #/required: 'y'"
    )
    any_of = {"type": "object", "anyOf": [{}]}
    assert_refused(
        constraint_of("glm47", {"f": any_of}), "tools[0].parameters", "at #/anyOf: not supported"
    )
    names = constraint_of("pythonic", {"say-it": {}})
    assert_refused(names, "tools[0].name", "this model's calls cannot write it")
    keyword = constraint_of("pythonic", {"f": {"properties": {"from": {"type": "string"}}}})
    assert_refused(keyword, "tools[0].parameters", "at #/properties: ")


@pytest.mark.mlx
@pytest.mark.parametrize(
    "form",
    # Calls like Python's, texts between quotes of their own, marked tags.
    sampled(["longcat", *FORMS], ["pythonic", "gemma4", "kimi_k3"]),
)
async def test_a_real_model_writes_valid_calls(
    socket_dir: Path, model_dir: Build, tmp_path: Path, form: str
) -> None:
    quote = FORMS[form].quotes[1] if form in FORMS else '"'
    tokens = [mark for mark in (quote, *format_of(form).call_markers) if len(mark) > 1]
    is_marked = form == "kimi_k3"
    model = add_chat(
        model_dir(**PADDED),
        tmp_path / "model",
        XTML if is_marked else tokens,
        special=is_marked,
        parser=form,
    )
    async with serving(socket_dir, model, context_length=2048) as server:
        assert (await server.status()).model.capabilities.required_tools
        ids = (await server.stub.Tokenize(pb.TokenizeRequest(content=quote))).token_ids
        # Ends a text, and the answer as soon as it may end.
        bias = {ids[0]: 6.0, 0: 100.0}
        for seed in range(3):
            request = pb.ChatRequest(
                messages=[pb.ChatMessage(role=pb.ROLE_USER, content="Which way?")],
                tools=[
                    pb.Tool(name=name, parameters=json.dumps(SCHEMAS[name])) for name in SCHEMAS
                ],
                tool_choice=pb.TOOL_CHOICE_REQUIRED,
                tool_name="turn",
                # The marker of reasoning begins like that of calls.
                reasoning_budget=3 if is_marked else None,
                options=pb.CompletionOptions(
                    num_predict=800, temperature=1.0, seed=seed, logit_bias=bias
                ),
            )
            messages = [message async for message in server.stub.Chat(request)]
            last = messages[-1]
            assert (last.done_reason, last.constraint_satisfied) == (
                pb.DONE_REASON_TOOL_CALLS,
                True,
            )
            assert not "".join(message.content for message in messages).strip()
            ((call,),) = [message.tool_calls for message in messages if message.tool_calls]
            assert call.name == "turn"
            jsonschema.validate(json.loads(call.arguments), TURN)
