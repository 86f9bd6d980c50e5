"""Numeric types of options, with consistent wording of ranges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.decorators import FC

MAX_INT32 = 2**31 - 1


class Number:
    """Parser of a number in a range, as the type of an option.

    Args:
        low: The lowest value.
        high: The highest value.
        high_name: Description of the highest value, if only the runner knows the number.
        is_whole: Whether the number has no fraction.
        is_above: Whether ``low`` itself is excluded.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        high_name: str = "",
        is_whole: bool = False,
        is_above: bool = False,
    ) -> None:
        # click shows the name as the placeholder of the value.
        self.__name__ = "integer" if is_whole else "number"
        self._low = low
        self._high = high
        self._is_whole = is_whole
        self._is_above = is_above
        self.range = f"{'above ' if is_above else ''}{low} to {high_name or high}"

    @property
    def help(self) -> str:
        """The range as a sentence; empty for the range of 64-bit integers."""
        if self._low < -MAX_INT32:
            return ""
        is_open = self._high == MAX_INT32 and self.range.endswith(str(MAX_INT32))
        text = f"at least {self._low}" if is_open else self.range
        return f" {text[0].upper()}{text[1:]}."

    def __call__(self, value: float | str) -> float:
        """Parse a value.

        Raises:
            click.BadParameter: The value is not a number, or not in the range.
        """
        try:
            number = int(value) if self._is_whole else float(value)
        except ValueError:
            kind = "a whole number" if self._is_whole else "a number"
            raise click.BadParameter(f"{value!r} is not {kind} ({self.range})") from None
        inside = self._low <= number <= self._high and not math.isnan(number)
        if not inside or (self._is_above and number == self._low):
            shown = number if self._is_whole else f"{number:g}"
            raise click.BadParameter(f"{shown} is not in the range {self.range}")
        return number


def integer(low: int, high: int = MAX_INT32, *, high_name: str = "") -> Number:
    """Return the type of an option for whole numbers in a range."""
    return Number(low, high, high_name=high_name, is_whole=True)


def number_option(flag: str, kind: Number, effect: str, default: str) -> Callable[[FC], FC]:
    """Return an option whose help names the range and the runner's default."""
    return click.option(flag, type=kind, help=f"{effect}{kind.help}  [default: {default}]")
