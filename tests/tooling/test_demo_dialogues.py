"""The conversations that the demo model is trained with."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.chat import environment
from tools.demo_model import bundle
from tools.demo_model.dialogues import Dialogue, dialogues


def test_the_parts_of_a_conversation_are_the_text_of_the_template() -> None:
    template = environment.compiled(bundle.CHAT_TEMPLATE)
    for dialogue in dialogues(50, seed=1, held_out=False):
        parts = list(bundle.as_parts(dialogue))
        whole = environment.render(template, dialogue.messages, dialogue.tools, {})
        asked = f"\n{bundle.ASSISTANT}\n"
        assert "".join(text for text, _ in parts) == (
            whole.removesuffix(asked) + bundle.DOCUMENT_END
        )
        answers = [text for text, is_answer in parts if is_answer]
        assert all(text.endswith(bundle.TURN_END) for text in answers)
        assert len(answers) == sum(m["role"] == "assistant" for m in dialogue.messages)


def test_no_held_out_argument_is_in_a_training_conversation() -> None:
    trained = _named(dialogues(400, seed=1, held_out=False))
    held_out = _named(dialogues(400, seed=1, held_out=True))
    assert len(held_out) > 20
    assert not trained & held_out


def _named(written: list[Dialogue]) -> set[str]:
    """Return the names of places and people in the arguments of calls."""
    return {
        value
        for dialogue in written
        for message in dialogue.messages
        for call in message.get("tool_calls", ())
        for value in call["function"]["arguments"].values()
        if isinstance(value, str) and value.istitle() and value not in LANGUAGES
    }


LANGUAGES = {"German", "French", "Spanish", "Italian", "Latin", "Greek"}
"""Arguments that are chosen from a closed list."""
