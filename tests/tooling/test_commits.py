"""Rules of commit messages."""

from __future__ import annotations

import pytest

from tools.commits import problems


@pytest.mark.parametrize(
    "message", ["Count NumPy in the estimate", "Embed the model\n\nWhy, with figures.", "A" * 72]
)
def test_a_good_message_has_no_problem(message: str) -> None:
    assert list(problems(message)) == []


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("A" * 73, "73 characters"),
        ("count NumPy", "capital letter"),
        ("Count NumPy.", "period"),
        ("Counted NumPy", "not imperative"),
        ("Counting NumPy", "not imperative"),
        ("Count NumPy\nin the estimate", "no blank line"),
    ],
)
def test_each_broken_rule_is_reported(message: str, problem: str) -> None:
    (found,) = problems(message)
    assert problem in found
