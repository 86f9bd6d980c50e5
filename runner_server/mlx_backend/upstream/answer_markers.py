"""The markers of reasoning and tool calls that mlx_lm knows, and its parsers of tool calls.

Reimplemented from ``mlx_lm.tokenizer_utils`` and ``mlx_lm.generate``, because these import
transformers, in 1 to 3 s. Tests compare both. The markers of gpt-oss, which mlx_lm lacks, are in
:mod:`runner_server.chat.gpt_oss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runner_server.chat import gpt_oss
from runner_server.chat.format import CONTENT, HEADER, REASONING, TOOL, AnswerFormat
from runner_server.mlx_backend.upstream.lean_import import import_lean
from runner_server.mlx_backend.upstream.package_files import package_file

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

_PARSERS_PACKAGE = "mlx_lm.tool_parsers"

_STATES = {"normal": CONTENT, "reasoning": REASONING, "tool": TOOL, "header": HEADER}
"""Names of states in mlx_lm, and here."""

_PARSERS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("minimax_m2", (("<minimax:tool_call>",),)),
    ("gemma4", (("<|tool_call>", "<tool_call|>"),)),
    ("function_gemma", (("<start_function_call>",),)),
    ("longcat", (("<longcat_tool_call>",),)),
    ("glm47", (("<arg_key>",),)),
    ("pythonic", (("<|tool_list_start|>",), ("<|tool_call_start|>",))),
    ("qwen3_coder", (("<tool_call>\\n<function=",), ("<tool_call>\n<function=",))),
    ("kimi_k2", (("<|tool_calls_section_begin|>",),)),
    ("minicpm5", (('<function name="', '<param name="'),)),
    ("mistral", (("[TOOL_CALLS]",),)),
    ("muse_spark", (("<atem:function_calls>",),)),
    ("json_tools", (("<tool_call>", "tool_call.name"),)),
)
"""Parsers in order of preference, each with sets of texts; a template has all texts of one set."""

HasToken = Callable[[str], bool]


def answer_format(
    has_token: HasToken, config: Mapping[str, Any], defaults: Mapping[str, Any], template: str
) -> AnswerFormat:
    """Return the answer format of a model.

    Args:
        has_token: Tells whether the vocabulary has a token.
        config: The tokenizer's configuration.
        defaults: mlx_lm's settings for models of this type.
        template: The model's chat template, for conversations with tools; may be empty.

    Raises:
        ValueError: mlx_lm lacks the parser of tool calls that the configuration names.
    """
    parser = config.get("tool_parser_type", defaults.get("tool_parser_type"))
    if gpt_oss.is_named(parser, template):
        return gpt_oss.FORMAT
    transitions: dict[str, list[tuple[str, str]]] = {}
    think_start, think_end = _thinking(has_token)
    if think_start:
        transitions = {CONTENT: [(think_start, REASONING)], REASONING: [(think_end, CONTENT)]}
    if _is_xtml(has_token):
        transitions.setdefault(CONTENT, []).extend((text, CONTENT) for text in _XTML_DROPPED)
    described = _response_format(
        config.get("chat_template_type", defaults.get("chat_template_type"))
    )
    markers = described.get("transitions", {})
    parser = parser or _parser_of(template, has_token)
    if parser:
        names_calls = any(to == "tool" for edges in markers.values() for _, to in edges)
        _add_tools(transitions, str(parser), is_begin_known=names_calls)
    for state, edges in markers.items():
        known = [(text, _STATES[to]) for text, to in edges]
        transitions.setdefault(_STATES[state], []).extend(known)
    found = AnswerFormat(
        transitions={state: tuple(edges) for state, edges in transitions.items()},
        initial=_STATES[described.get("initial_state", "normal")],
        think_start=think_start,
        tool_parser=_parser_file(parser) if parser else "",
    )
    return found if parser else found.without_tools()


def _add_tools(
    transitions: dict[str, list[tuple[str, str]]], parser: str, *, is_begin_known: bool
) -> None:
    """Add the markers of tool calls, in the order of mlx_lm."""
    _parser_file(parser)
    module = import_lean(f"{_PARSERS_PACKAGE}.{parser}")
    structural = transitions.pop(CONTENT, [])
    begin = [edge for edge in structural if edge[1] == REASONING]
    if not is_begin_known:
        begin.append((module.tool_call_start, TOOL))
    transitions[CONTENT] = [*begin, *(edge for edge in structural if edge[1] != REASONING)]
    if REASONING in transitions:
        transitions[REASONING].append((module.tool_call_start, TOOL))
    transitions[TOOL] = [(module.tool_call_end, CONTENT)] if module.tool_call_end else []


def _parser_file(parser: object) -> str:
    if not (file := package_file("tool_parsers", parser)):
        raise ValueError(f"tool_parser_type is {parser!r}, which mlx_lm lacks")
    return str(file)


def _parser_of(template: str, has_token: HasToken) -> str:
    for parser, choices in _PARSERS:
        if any(all(text in template for text in texts) for texts in choices):
            return parser
    if _is_xtml(has_token):
        return "kimi_k3"
    has_markers = has_token("<|tool_call_start|>") and has_token("<|tool_call_end|>")
    return "pythonic" if has_markers else ""


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
