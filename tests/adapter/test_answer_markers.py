"""The markers in answers, compared with those that mlx_lm finds."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.chat import gpt_oss
from runner_server.chat.format import CONTENT, HEADER, REASONING, TOOL
from runner_server.mlx_backend.upstream.answer_markers import answer_format

XTML = ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"]
VOCABULARIES: dict[str, list[str]] = {
    "none": ["a", "<think>", "</longcat_think>", "<|open|>"],
    "Qwen": ["<think>", "</think>"],
    "LongCat": ["<longcat_think>", "</longcat_think>"],
    "Apertus": ["<|think:start|>", "<|think:end|>"],
    "Gemma 4": ["<|channel>", "<channel|>"],
    "Kimi K3": XTML,
    "several": [*XTML, "<|channel>", "<channel|>", "<think>", "</think>"],
}
PARSERS = [
    *("function_gemma", "gemma4", "glm47", "json_tools", "kimi_k2", "kimi_k3", "laguna", "longcat"),
    *("minicpm5", "minimax_m2", "mistral", "muse_spark", "pythonic", "qwen3_coder"),
]
NAMES = {"normal": CONTENT, "reasoning": REASONING, "tool": TOOL, "header": HEADER}


def machine(
    vocabulary: list[str], response: dict[str, Any], parser: Any = None
) -> dict[str, list[tuple[str, str]]]:
    """Return the transitions of mlx_lm's state machine; ``parser`` is a module of parsers."""
    from mlx_lm import tokenizer_utils

    # The package has a function of the same name.
    generate: Any = importlib.import_module("mlx_lm.generate")

    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = SimpleNamespace(get_vocab=lambda: ids, encode=lambda text, **_: [text])
    start, end, _, _ = tokenizer_utils._infer_thinking(tokenizer)
    shown = SimpleNamespace(
        has_thinking=start is not None,
        think_start=start,
        think_end=end,
        has_tool_calling=parser is not None,
        tool_call_start=parser and parser.tool_call_start,
        tool_call_end=parser and parser.tool_call_end,
        structural_markers=tokenizer_utils._infer_structural_markers(tokenizer),
        response_transitions=response,
    )
    made: dict[str, list[tuple[str, str]]] = {}
    original = generate.TextStateMachine
    try:
        generate.TextStateMachine = lambda transitions: made.update(transitions or {})
        generate.make_text_state_machine(shown)
    finally:
        generate.TextStateMachine = original
    return {
        NAMES[state]: [(text, NAMES[to]) for text, to in edges if parser or to != "tool"]
        for state, edges in made.items()
    }


def parser_module(name: str) -> Any:
    """Return a parser of mlx_lm."""
    return importlib.import_module(f"mlx_lm.tool_parsers.{name}")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_markers_are_those_of_mlx_lm(name: str) -> None:
    vocabulary = VOCABULARIES[name]
    found = answer_format(vocabulary.__contains__, {}, {}, "")
    is_xtml = set(XTML) <= set(vocabulary)
    expected = machine(vocabulary, {}, parser_module("kimi_k3") if is_xtml else None)
    assert {state: list(edges) for state, edges in found.transitions.items()} == expected
    assert found.initial == CONTENT


@pytest.mark.parametrize("place", ["config", "defaults"])
def test_the_format_of_spark_is_that_of_mlx_lm(place: str) -> None:
    from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT

    settings = {"chat_template_type": "muse_spark"}
    empty: dict[str, dict[str, Any]] = {"config": {}, "defaults": {}}
    found = answer_format(lambda _: False, **(empty | {place: settings}), template="")
    expected = machine([], RESPONSE_FORMAT["transitions"])
    assert {state: list(edges) for state, edges in found.transitions.items()} == expected
    assert found.initial == HEADER


@pytest.mark.parametrize("vocabulary", [[], ["<think>", "</think>"], XTML], ids=["", "Qwen", "K3"])
@pytest.mark.parametrize("name", PARSERS)
def test_markers_of_tool_calls_are_those_of_mlx_lm(name: str, vocabulary: list[str]) -> None:
    found = answer_format(vocabulary.__contains__, {"tool_parser_type": name}, {}, "")
    expected = machine(vocabulary, {}, parser_module(name))
    assert {state: list(edges) for state, edges in found.transitions.items()} == expected
    assert found.tool_parser == parser_module(name).__file__
    edges = found.without_tools().transitions.values()
    assert TOOL not in {to for each in edges for _, to in each}


GPT_OSS = "<|start|>assistant {{ x }} <|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("config", "template"), [({}, GPT_OSS), ({"tool_parser_type": "gpt_oss"}, "")]
)
def test_gpt_oss_is_known_by_its_template_or_by_name(config: dict[str, Any], template: str) -> None:
    found = answer_format(lambda _: False, config, {}, template)
    assert found == gpt_oss.FORMAT
    assert (found.call_form, found.has_reasoning) == ("gpt_oss", True)
    assert found.can_require_calls
    named = answer_format(lambda _: False, {"tool_parser_type": "json_tools"}, {}, template)
    assert named.call_form == "json_tools"


TEMPLATES = [
    "",
    "x <minimax:tool_call> [TOOL_CALLS]",
    "<|tool_call>",
    "<|tool_call> <tool_call|>",
    "<start_function_call>",
    "<longcat_tool_call>",
    "<tool_call> <arg_key> tool_call.name",
    "<|tool_list_start|>",
    "<|tool_call_start|>",
    "<tool_call>\\n<function=",
    "<tool_call>\n<function=",
    "<|tool_calls_section_begin|>",
    '<function name="',
    '<function name="x"> <param name="y">',
    "[TOOL_CALLS]",
    "<atem:function_calls>",
    "<tool_call>",
    "<tool_call> tool_call.name",
]


@pytest.mark.parametrize("vocabulary", [[], XTML, ["<|tool_call_start|>", "<|tool_call_end|>"]])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_parser_is_the_one_of_mlx_lm(template: str, vocabulary: list[str]) -> None:
    from mlx_lm import tokenizer_utils

    tokenizer = SimpleNamespace(chat_template=template, get_vocab=lambda: vocabulary)
    name = tokenizer_utils._infer_tool_parser(tokenizer)
    found = answer_format(vocabulary.__contains__, {}, {}, template)
    assert found.tool_parser == (parser_module(name).__file__ if name else "")


@pytest.mark.parametrize("name", ["nobodys", "../x", 5])
def test_a_parser_that_mlx_lm_lacks_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="mlx_lm lacks"):
        answer_format(lambda _: False, {"tool_parser_type": name}, {}, "")
