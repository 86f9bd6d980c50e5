"""The chat format of a model: the templates of its prompts, and the markers in its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from runner_server.errors import ModelUnsupported

CONTENT, REASONING, TOOL, HEADER = "content", "reasoning", "tool", "header"
"""States of an answer: text, the reasoning before it, a tool call, and text that is left out."""

JSON_CALLS = ("gpt_oss", "json_tools", "kimi_k2", "longcat", "mistral")
FLAT_CALLS = (
    *("function_gemma", "gemma4", "glm47", "kimi_k3", "laguna", "minicpm5", "minimax_m2"),
    *("pythonic", "qwen3_coder"),
)
REQUIRED_CALLS = (*JSON_CALLS, *FLAT_CALLS)
"""Forms of calls that a grammar can require: with JSON arguments, or with texts and numbers."""

Transitions = Mapping[str, tuple[tuple[str, str], ...]]
"""By state, pairs of a marker and the state after it."""


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes answers.

    Attributes:
        transitions: The markers.
        initial: The state in which an answer begins.
        think_start: The marker before reasoning; empty if the model has none.
        content_start: The marker between reasoning and content of a model whose answers begin with
            the reasoning; empty for others.
        tool_parser: File of the parser for the text of tool calls; empty if there is none.
    """

    transitions: Transitions = field(default_factory=dict)
    initial: str = CONTENT
    think_start: str = ""
    content_start: str = ""
    tool_parser: str = ""

    @property
    def call_form(self) -> str:
        """The name of the parser of tool calls; empty if there is none."""
        return PurePath(self.tool_parser).stem

    @property
    def call_markers(self) -> tuple[str, str]:
        """The markers before and after tool calls; the second one may be empty."""
        begin = (text for edges in self.transitions.values() for text, to in edges if to == TOOL)
        end = (text for text, _ in self.transitions.get(TOOL, ()))
        return next(begin, ""), next(end, "")

    @property
    def can_require_calls(self) -> bool:
        """Whether a grammar can require tool calls."""
        return self.call_form in REQUIRED_CALLS and bool(self.call_markers[0])

    @property
    def think_end(self) -> str:
        """The marker after reasoning; empty if the model has none."""
        edges = self.transitions.get(REASONING, ())
        return next((text for text, to in edges if to != TOOL), "")

    @property
    def has_reasoning(self) -> bool:
        """Whether both markers of reasoning are known."""
        return bool(self.think_start and self.think_end)

    def with_calls_in_content(self) -> AnswerFormat:
        """Return the format of answers in which only its own marker ends the reasoning."""
        edges = self.transitions.get(REASONING, ())
        kept = tuple((text, to) for text, to in edges if to != TOOL)
        return replace(self, transitions={**self.transitions, REASONING: kept})

    def without_tools(self) -> AnswerFormat:
        """Return the format of answers in which the markers of tool calls are text."""
        kept = {
            state: tuple((text, to) for text, to in edges if to != TOOL)
            for state, edges in self.transitions.items()
        }
        return replace(self, transitions=kept, tool_parser="")

    def state_after(self, prompt: str) -> str:
        """Return the state in which the answer to a prompt begins.

        Some templates open the reasoning or the content themselves, at the end of the prompt.
        """
        end = prompt.rstrip()
        for marker, state in ((self.think_start, REASONING), (self.content_start, CONTENT)):
            if marker and end.endswith(marker):
                return state
        return self.initial

    def may_reason_after(self, prompt: str) -> bool:
        """Return whether the answer to a prompt may begin with reasoning."""
        is_content = self.initial != CONTENT and self.state_after(prompt) == CONTENT
        return self.has_reasoning and not is_content


@dataclass(frozen=True)
class ChatFormat:
    """How a model writes conversations, as its files say.

    Attributes:
        templates: Jinja templates by name; a model with one template has ``"default"`` only.
        special_tokens: Texts of the special tokens by role (``bos_token``, ...), for the templates.
        python_template: File of mlx_lm's template in Python, used instead of ``templates``; empty
            if there is none.
        answer: The markers in answers.
        problem: Why conversations cannot be rendered, if a file cannot be read.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    python_template: str = ""
    answer: AnswerFormat = field(default_factory=AnswerFormat)
    problem: str = ""

    @property
    def source(self) -> str:
        """The templates as one text.

        Raises:
            ModelUnsupported: The file of a template in Python cannot be read.
        """
        if not self.python_template:
            return "\n".join(self.templates.values())
        try:
            return Path(self.python_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelUnsupported(f"the chat template cannot be read: {error}") from error

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.templates or self.python_template) and not self.problem
