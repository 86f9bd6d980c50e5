"""Progress on a terminal and without one: the bar of a load, and the steps of doctor."""

from __future__ import annotations

import io
import sys
import unicodedata
from typing import TYPE_CHECKING
from unittest.mock import Mock

import click
import pytest

from runner_client.cli.shared.output import LoadProgress, StepLine
from runner_client.errors import RunnerError
from runner_client.types import MemoryUsage, State, Status

if TYPE_CHECKING:
    pass


class Terminal(io.StringIO):
    """Text stream posing as a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_steps_take_one_line_of_a_terminal_and_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    with StepLine() as progress:
        progress("first")
        progress("measuring a library with a long name")
    shown = [part.removesuffix("\x1b[K") for part in stream.getvalue().split("\r")[1:]]
    assert shown[0] == "first ..."
    assert len(shown[1]) <= 29
    assert shown[1].startswith("measuring")
    assert shown[2] == ""


def test_steps_are_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with StepLine() as progress:
        progress("first")
    assert stream.getvalue() == ""


def _status(progress: int) -> Status:
    memory = MemoryUsage(0, 0, 0, 0, 0)
    settings = (0, memory, None, 4, 0, 0, 0, None, 0.0, "id", 1, "", "", "")
    return Status(State.LOADING, progress, 0, *settings)


def _show_load(stream: io.StringIO, error: Exception | None = None, name: str = "m") -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        with LoadProgress(name) as progress:
            for percent in (0, 3, 12, 14, 12, 50, 50, 99):
                progress(_status(percent))
            if error is not None:
                raise error
    return stream.getvalue()


def test_a_load_on_a_terminal_shows_a_bar() -> None:
    shown = _show_load(Terminal())
    assert "loading m" in shown
    assert "50%" in shown
    assert shown.rstrip("\n").endswith("\x1b[?25h")
    assert "100%" in shown


LONG_NAMES = ("/models/" + "long-name/" * 20 + "end", "org/" + "模型" * 40, "m\n\x1b[2J" * 30)


@pytest.mark.parametrize("name", LONG_NAMES, ids=["path", "wide", "control"])
@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_bar_stays_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = _show_load(Terminal(), name=name)
    assert shown.count("\n") == 1
    lines = [line for line in click.unstyle(shown).rstrip("\n").split("\r") if line]
    assert len(lines) > 3
    widths = {
        sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in line)
        for line in lines
    }
    assert max(widths) < columns
    assert all("[" in line and "%" in line for line in lines)
    assert ("end  [" in shown) is (name is LONG_NAMES[0] and columns > 20)


def test_the_bar_follows_a_terminal_that_becomes_narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with LoadProgress("model-" * 12) as progress:
        before = len(stream.getvalue())
        monkeypatch.setenv("COLUMNS", "60")
        progress(_status(50))
        progress(_status(99))
    drawn = click.unstyle(stream.getvalue()[before:]).rstrip("\n")
    assert max(map(len, drawn.split("\r"))) < 60


def test_an_interrupt_while_the_bar_appears_shows_the_cursor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(stream, "flush", Mock(side_effect=[KeyboardInterrupt, None, None]))
    with pytest.raises(KeyboardInterrupt):
        _show_load(stream)
    assert stream.getvalue().endswith("\x1b[?25h\n")


def test_a_load_without_a_terminal_prints_a_few_lines() -> None:
    assert _show_load(io.StringIO()).splitlines() == [
        "loading m",
        "loading m: 12 %",
        "loading m: 50 %",
        "loading m: 99 %",
    ]


def test_a_failed_load_is_never_shown_as_complete() -> None:
    stream = Terminal()
    with pytest.raises(RunnerError):
        _show_load(stream, RunnerError("it failed"))
    assert "100%" not in stream.getvalue()
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with LoadProgress("m"):
        assert isinstance(sys.stderr, Terminal)
    assert click.unstyle(sys.stderr.getvalue()) == sys.stderr.getvalue() != ""
