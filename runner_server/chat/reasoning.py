"""What a request says about the reasoning of its answer."""

from __future__ import annotations

from dataclasses import dataclass

from runner_server.chat.format import AnswerFormat


@dataclass(frozen=True)
class Reasoning:
    """The reasoning of one answer, to which its constraint does not apply.

    Attributes:
        markers: How the model writes answers, with markers of reasoning.
        is_open: Whether the prompt has opened the reasoning.
        budget: Most tokens of reasoning; None for any number.
        lead: The marker between the reasoning and the constrained text; may be empty.
    """

    markers: AnswerFormat
    is_open: bool
    budget: int | None = None
    lead: str = ""
