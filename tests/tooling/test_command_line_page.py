"""docs/command-line.md is the page that the help texts make."""

from __future__ import annotations

from tools.command_line import PAGE, page


def test_the_page_of_the_command_line_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.command_line"
