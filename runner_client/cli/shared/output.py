"""Output of the commands: aligned rows, JSON, progress and rates."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Self

import click

from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from click._termui_impl import ProgressBar

    from runner_client.types import Completion, Model, Status

Row = tuple[str, str]
"""A name and its value."""

_LINE_EVERY_PERCENT = 10
_COMPLETE = 100

_BAR_COLUMNS = 36
_LEAST_BAR_COLUMNS = 10
_AROUND_BAR_COLUMNS = len("  []  100%")
_USUAL_COLUMNS = 80

_CLEAR_TO_END = "\x1b[K"


def print_json(value: object) -> None:
    """Print one JSON object to standard output."""
    click.echo(json.dumps(_plain(value), ensure_ascii=False))


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def print_rows(rows: Iterable[Row], *, err: bool = False) -> None:
    """Print rows with an aligned second column."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}", err=err)


def draft_model_rows(model: Model) -> list[Row]:
    """Return a row about the draft model, if there is one."""
    draft = model.draft_model
    return [("draft model", f"{draft.name} ({format_bytes(draft.weight_bytes)})")] if draft else []


def model_rows(model: Model) -> list[Row]:
    """Return the rows about a loaded model's format and warnings."""
    rows = [*draft_model_rows(model), *(("warning", text) for text in model.warnings)]
    if not model.dtype_fallback:
        return rows
    return [("held", "as stored, which is slow on a CPU: not enough memory for float32"), *rows]


def completion_rows(completion: Completion) -> list[Row]:
    """Return the rows about the tokens and rates of a completion."""
    cached = completion.prompt_cached_count
    kept = f" ({cached:,} from the prefix cache)" if cached else ""
    prompt_rate = _rate(completion.prompt_eval_count - cached, completion.prompt_eval_seconds)
    # The time runs from the first token to the last, so the first token does not count.
    rate = _rate(completion.eval_count - 1, completion.eval_seconds)
    ending = f"ended by {completion.done_reason}"
    if completion.stop_match:
        ending += f" {completion.stop_match!r}"
    if completion.drafted_count:
        accepted, drafted = completion.draft_accepted_count, completion.drafted_count
        ending += f", {accepted:,} of {drafted:,} drafted tokens were right"
    if completion.constraint_satisfied is False:
        ending += ", before the text was what the constraint asks for"
    return [
        ("prompt", f"{_tokens(completion.prompt_eval_count)}{kept}{prompt_rate}"),
        ("generated", f"{_tokens(completion.eval_count)}{rate}, {ending}"),
    ]


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _rate(count: int, seconds: float) -> str:
    return f", {count / seconds:,.1f} tokens/s" if count > 0 and seconds > 0 else ""


def is_terminal() -> bool:
    """Return whether standard error is a terminal able to redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class StepLine:
    """Line on standard error with the current step of a command; silent without a terminal."""

    def __init__(self) -> None:
        self._is_shown = is_terminal()

    def __call__(self, step: str) -> None:
        """Show a step in place of the previous one."""
        if self._is_shown:
            text = _shortened(f"{step} ...", _columns() - 1)
            click.echo(f"\r{text}{_CLEAR_TO_END}", nl=False, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._is_shown:
            click.echo(f"\r{_CLEAR_TO_END}", nl=False, err=True)


class Progress:
    """Progress on standard error: a bar on a terminal, otherwise occasional lines.

    Args:
        label: What is done, for instance ``"loading org/name"``.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._percent = 0
        self._bar: ProgressBar[int] | None = None
        if is_terminal():
            self._bar = click.progressbar(length=_COMPLETE, file=sys.stderr, show_eta=False)
            self._fit()

    def show(self, percent: int) -> None:
        """Show how much is done, in percent."""
        if self._bar is not None:
            self._fit()
            self._bar.update(percent - self._percent)
        elif percent < self._percent + _LINE_EVERY_PERCENT:
            return
        else:
            click.echo(f"{self._label}: {percent} %", err=True)
        self._percent = percent

    def _fit(self) -> None:
        """Fit label and bar into one line of the terminal, which may have been resized."""
        if self._bar is None:
            return
        # A character in the last column would wrap on some terminals.
        room = max(0, _columns() - 1 - _AROUND_BAR_COLUMNS)
        label = _shortened(self._label, room - _LEAST_BAR_COLUMNS)
        width = min(_BAR_COLUMNS, room - _cells(label))
        if (label, width) != (self._bar.label, self._bar.width):
            self._bar.label, self._bar.width = label, width
            # Otherwise click pads with blanks to the longest line so far, which would wrap.
            self._bar.max_width = None

    def __enter__(self) -> Self:
        if self._bar is None:
            click.echo(self._label, err=True)
            return self
        try:
            self._bar.__enter__()
        except BaseException:
            # An interrupt would leave the cursor hidden.
            self._bar.render_finish()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.show(_COMPLETE)
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)


class LoadProgress(Progress):
    """Progress of a load.

    Args:
        name: The name of the model.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"loading {name}")

    def __call__(self, status: Status) -> None:
        """Show the progress given by a status of the runner."""
        self.show(status.progress)


def _columns() -> int:
    """Return the width of the terminal on standard error; standard output may be a file."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_COLUMNS
    except (OSError, ValueError):
        return _USUAL_COLUMNS


def _cells(text: str) -> int:
    """Return the columns that a text takes: two for each wide East Asian character."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def _shortened(label: str, columns: int) -> str:
    """Return a label of at most ``columns``: the first word, and the end of the rest."""
    label = "".join(each if each.isprintable() else "?" for each in label)
    if _cells(label) <= columns:
        return label
    verb, _, name = label.partition(" ")
    verb += " \u2026"
    while name and _cells(verb + name) > columns:
        name = name[1:]
    return verb + name if name else ""
