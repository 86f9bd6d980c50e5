"""An answer in progress: text and reasoning told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner_server.chat.format import CONTENT, REASONING, AnswerFormat
from runner_server.chat.splitter import AnswerSplitter


@dataclass(frozen=True)
class AnswerPart:
    """New parts of an answer."""

    content: str = ""
    reasoning: str = ""


class Answer:
    """Divides the text of an answer, and counts the tokens of its reasoning.

    Args:
        model: The markers of the model.
        prompt: The prompt, in which a template may have opened the reasoning.

    Attributes:
        reasoning_count: Tokens whose text was complete within the reasoning, its markers included.
    """

    def __init__(self, model: AnswerFormat, prompt: str) -> None:
        self._splitter = AnswerSplitter(model.transitions, model.state_after(prompt))
        self.reasoning_count = 0

    def add(self, texts: Sequence[str], *, is_last: bool) -> AnswerPart:
        """Add the texts of tokens, one for each; return what they make certain."""
        parts: list[tuple[str, str]] = []
        for text in texts:
            before = self._splitter.state
            parts += self._splitter.feed(text)
            self.reasoning_count += REASONING in (before, self._splitter.state)
        if is_last:
            parts += self._splitter.flush()
        return AnswerPart(_joined(parts, CONTENT), _joined(parts, REASONING))


def _joined(parts: Sequence[tuple[str, str]], state: str) -> str:
    return "".join(text for of, text in parts if of == state)
