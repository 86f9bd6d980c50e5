"""The markers in answers, compared with those that mlx_lm finds."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.chat.format import CONTENT, HEADER, REASONING
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
NAMES = {"normal": CONTENT, "reasoning": REASONING, "header": HEADER}


def machine(vocabulary: list[str], response: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the transitions of mlx_lm's state machine, without tools."""
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
        has_tool_calling=False,
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
        NAMES[state]: [(text, NAMES[to]) for text, to in edges if to in NAMES]
        for state, edges in made.items()
    }


@pytest.mark.parametrize("name", VOCABULARIES)
def test_markers_are_those_of_mlx_lm(name: str) -> None:
    vocabulary = VOCABULARIES[name]
    found = answer_format(vocabulary.__contains__, {}, {})
    expected = machine(vocabulary, {})
    assert {state: list(edges) for state, edges in found.transitions.items()} == expected
    assert found.initial == CONTENT


@pytest.mark.parametrize("place", ["config", "defaults"])
def test_the_format_of_spark_is_that_of_mlx_lm(place: str) -> None:
    from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT

    settings = {"chat_template_type": "muse_spark"}
    empty: dict[str, dict[str, Any]] = {"config": {}, "defaults": {}}
    found = answer_format(lambda _: False, **(empty | {place: settings}))
    expected = machine([], RESPONSE_FORMAT["transitions"])
    assert {state: list(edges) for state, edges in found.transitions.items()} == expected
    assert found.initial == HEADER
