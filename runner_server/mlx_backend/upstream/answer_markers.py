"""The markers of reasoning that mlx_lm knows, and the answer formats of its templates.

Reimplemented from ``mlx_lm.tokenizer_utils`` and ``mlx_lm.generate``, because these import
transformers, in 1 to 3 s. Tests compare both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runner_server.chat.format import CONTENT, HEADER, REASONING, AnswerFormat
from runner_server.mlx_backend.upstream.lean_import import import_lean

_THINKING = (
    ("<think>", "</think>", ("<think>", "</think>")),
    ("<longcat_think>", "</longcat_think>", ("<longcat_think>", "</longcat_think>")),
    ("<|think:start|>", "<|think:end|>", ("<|think:start|>", "<|think:end|>")),
    ("<|channel>", "<channel|>", ("<|channel>thought", "<channel|>")),
)
"""Tokens of a vocabulary, and the markers they mean, in order of preference."""

_XTML_TOKENS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
_XTML_THINKING = ("<|open|>think<|sep|>", "<|close|>think<|sep|>")
_XTML_DROPPED = (
    "<|open|>response<|sep|>",
    "<|close|>response<|sep|>",
    "<|close|>message<|sep|>",
)

_STATES = {"normal": CONTENT, "reasoning": REASONING, "header": HEADER}
"""Names of states in mlx_lm, and here."""

HasToken = Callable[[str], bool]


def answer_format(
    has_token: HasToken, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> AnswerFormat:
    """Return the answer format of a model.

    Args:
        has_token: Tells whether the vocabulary has a token.
        config: The tokenizer's configuration.
        defaults: mlx_lm's settings for models of this type.
    """
    transitions: dict[str, list[tuple[str, str]]] = {}
    think_start, think_end = _thinking(has_token)
    if think_start:
        transitions = {CONTENT: [(think_start, REASONING)], REASONING: [(think_end, CONTENT)]}
    if _is_xtml(has_token):
        transitions.setdefault(CONTENT, []).extend((text, CONTENT) for text in _XTML_DROPPED)
    described = _response_format(
        config.get("chat_template_type", defaults.get("chat_template_type"))
    )
    for state, edges in described.get("transitions", {}).items():
        known = [(text, _STATES[to]) for text, to in edges if to in _STATES]
        transitions.setdefault(_STATES[state], []).extend(known)
    return AnswerFormat(
        transitions={state: tuple(edges) for state, edges in transitions.items()},
        initial=_STATES[described.get("initial_state", "normal")],
        think_start=think_start,
    )


def _thinking(has_token: HasToken) -> tuple[str, str]:
    for start, end, markers in _THINKING:
        if has_token(start) and has_token(end):
            return markers
    return _XTML_THINKING if _is_xtml(has_token) else ("", "")


def _is_xtml(has_token: HasToken) -> bool:
    return all(map(has_token, _XTML_TOKENS))


def _response_format(template_type: object) -> Mapping[str, Any]:
    """Return the description of answers that a template of mlx_lm comes with; empty if none."""
    if template_type != "muse_spark":
        return {}
    module = import_lean("mlx_lm.chat_templates.muse_spark")
    found: Mapping[str, Any] = module.RESPONSE_FORMAT
    return found
