"""Drafting: it gains where texts repeat themselves, and loses a bounded time elsewhere."""

from __future__ import annotations

import random

import pytest

from runner_server.engine.speculation.drafting import Drafting

MOST = 16
STEP_SECONDS = 0.02


def _steps(prompt: list[int], text: list[int], cost: float) -> tuple[float, int]:
    """Return the time to generate a text, in steps, and the number of tokens drafted.

    Args:
        prompt: The prompt.
        text: The text that the simulated model generates.
        cost: Time that a drafted token adds to a step, in steps.
    """
    drafting = Drafting(MOST)
    drafting.add(0, prompt, len(text))
    total, done, drafted = 0.0, 0, 0
    while done < len(text):
        draft = drafting.draft(0)
        assert done + len(draft) < len(text)
        right = 0
        while right < len(draft) and draft[right] == text[done + right]:
            right += 1
        steps = 1 + cost * len(draft)
        new = text[done : done + right + 1]
        drafting.record({0: new})
        drafting.record_alone(0, len(draft), len(new), steps * STEP_SECONDS)
        total, done, drafted = total + steps, done + len(new), drafted + len(draft)
    return total, drafted


def _random_text(length: int, kinds: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(kinds), k=length)  # noqa: S311 - test data


def test_a_copied_text_takes_a_fraction_of_the_steps() -> None:
    source = _random_text(400, 10_000, 1)
    steps, _ = _steps(source, source, cost=0.02)
    assert steps < 400 / 8


def test_the_first_draft_is_short() -> None:
    source = _random_text(50, 10_000, 2)
    drafting = Drafting(MOST)
    drafting.add(0, source, 50)
    for token in source[:5]:
        assert drafting.draft(0) == ()
        drafting.record_alone(0, 0, 1, STEP_SECONDS)
        drafting.record({0: [token]})
        if drafting.draft(0):
            break
    assert drafting.draft(0) == tuple(source[3:5])


@pytest.mark.parametrize("kinds", [2, 3, 5, 50])
@pytest.mark.parametrize("cost", [0.02, 0.3, 1.0])
def test_a_text_that_cannot_be_predicted_loses_little(kinds: int, cost: float) -> None:
    """Few kinds of tokens repeat often, and each time the prediction is a guess."""
    text = _random_text(2000, kinds, 3)
    steps, drafted = _steps(_random_text(2000, kinds, 4), text, cost)
    assert drafted
    # What the credit allows, and the cost of the first draft, which was not known.
    assert steps <= 1.01 * len(text) + 1 + 2 * cost


def test_what_was_gained_may_be_lost_only_in_part() -> None:
    source = _random_text(300, 10_000, 5)
    other = _random_text(1000, 3, 6)
    steps, _ = _steps(source, source + other, cost=0.3)
    alone, _ = _steps(source, source, cost=0.3)
    assert steps - alone <= 1.01 * len(other) + 8 + 2


def test_drafts_that_cost_as_much_as_steps_are_given_up() -> None:
    source = _random_text(600, 10_000, 7)
    steps, drafted = _steps(source, source, cost=1.2)
    assert steps <= 1.01 * len(source) + 3
    assert drafted < 60


def test_a_row_that_may_not_be_drafted_is_unknown() -> None:
    drafting = Drafting(MOST)
    drafting.record({0: [1]})
    drafting.record_alone(0, 0, 1, STEP_SECONDS)
    drafting.record_alone(0, 0, 1, STEP_SECONDS)
    assert drafting.draft(0) == ()


def test_without_drafts_no_text_is_kept() -> None:
    drafting = Drafting(0)
    drafting.add(0, [1] * 100, 100)
    for _ in range(5):
        drafting.record_alone(0, 0, 1, STEP_SECONDS)
    assert drafting.draft(0) == ()


def test_one_draft_that_was_held_up_does_not_end_drafts_for_good() -> None:
    """As by a machine that was suspended."""
    source = _random_text(400, 10_000, 8)
    drafting = Drafting(MOST)
    for _ in range(2):
        drafting.record_alone(-1, 0, 1, STEP_SECONDS)
    drafting.add(0, source, 400)
    drafting.record({0: source[:3]})
    assert drafting.draft(0) == tuple(source[3:5])
    drafting.record_alone(0, 2, 1, 3600.0)
    drafting.remove(0)
    drafting.add(1, source, 400)
    drafts = []
    for token in source[:-1]:
        drafting.record({1: [token]})
        drafting.record_alone(1, 0, 1, STEP_SECONDS)
        drafts.append(drafting.draft(1))
    assert any(drafts)
