"""Typed reading of JSON objects, with one error for all invalid fields."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from runner_common.serving.interceptor import UnreadableRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runner_common.serving.unknown_fields import Violations

_T = TypeVar("_T")

_MAX_VIOLATIONS = 8
_MAX_NAME_CHARS = 60

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)


class Fields:
    """Fields of a JSON object; null counts as absent.

    Args:
        value: The object.
        path: Where it stands in the request, such as ``messages[0]``; empty for the request itself.
        violations: Collects the problems of the whole request. Default: a new list.
    """

    def __init__(
        self, value: Mapping[str, Any], path: str = "", violations: Violations | None = None
    ) -> None:
        self._value = value
        self._path = path
        self._unread = {name for name, each in value.items() if each is not None}
        self.violations: Violations = [] if violations is None else violations

    def at(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def refuse(self, name: str, text: str) -> None:
        """Record the problem of a field."""
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append((self.at(name), text))

    def take(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return a field of any type; None if absent."""
        self._unread.discard(name)
        return self._value.get(name)

    def has(self, name: str) -> bool:
        """Return whether a field is present."""
        return self._value.get(name) is not None

    def text(self, name: str, *, required: bool = False) -> str | None:
        """Return a text; None if absent or not a text."""
        value = self.take(name)
        if value is None and required:
            self.refuse(name, "required: a text")
        return self._typed(name, value, str, "a text")

    def boolean(self, name: str) -> bool | None:
        """Return true or false; None if absent or neither."""
        return self._typed(name, self.take(name), bool, "true or false")

    def integer(self, name: str, low: int = INT32[0], high: int = INT32[1]) -> int | None:
        """Return a whole number; None if absent, or not in the range."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"a whole number is required, not {kind_of(value)}")
        elif not low <= value <= high:
            self.refuse(name, f"{_shown(value)} is not in the range {low} to {high}")
        else:
            return value
        return None

    def number(self, name: str) -> float | None:
        """Return a finite number; None if absent or not one."""
        value = self.take(name)
        return None if value is None else self.finite(name, value)

    def finite(self, name: str, value: object) -> float | None:
        """Return a finite number; record a problem for other values."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"a number is required, not {kind_of(value)}")
            return None
        # A whole number may be too large for a float.
        if (isinstance(value, int) and abs(value) > INT64[1]) or not math.isfinite(value):
            self.refuse(name, "the number is too large")
            return None
        return float(value)

    def choice(self, name: str, values: Sequence[str]) -> str | None:
        """Return one of some texts; None if absent or another."""
        value = self.text(name)
        if value is not None and value not in values:
            self.refuse(name, f"{value[:_MAX_NAME_CHARS]!r} is none of {', '.join(values)}")
            return None
        return value

    def items(self, name: str) -> list[Any]:
        """Return a list; an empty one if absent or not a list."""
        return self._typed(name, self.take(name), list, "a list") or []

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return an object; None if absent or not one."""
        return self._typed(name, self.take(name), dict, "an object")

    def inside(self, name: str) -> Fields | None:
        """Return the fields of an object inside; None if absent or not an object."""
        value = self.mapping(name)
        return None if value is None else Fields(value, self.at(name), self.violations)

    def each(self, name: str) -> list[Fields]:
        """Return the fields of each object in a list."""
        found = []
        for index, value in enumerate(self.items(name)):
            entry = f"{name}[{index}]"
            if not isinstance(value, dict):
                self.refuse(entry, f"an object is required, not {kind_of(value)}")
            is_object = isinstance(value, dict)
            found.append(Fields(value if is_object else {}, self.at(entry), self.violations))
        return found

    def end(self, refused: Mapping[str, str] | None = None) -> None:
        """Record the unread fields as problems.

        Args:
            refused: Why known fields are not supported, by name.
        """
        for name in sorted(self._unread):
            text = (refused or {}).get(name, "unknown to this server; leave it out")
            self.refuse(name[:_MAX_NAME_CHARS], text)

    def finish(self) -> None:
        """Raise the problems of the whole request, if there are any.

        Raises:
            UnreadableRequestError: At least one field is invalid.
        """
        if self.violations:
            raise UnreadableRequestError(self.violations)

    def _typed(self, name: str, value: object, kind: type[_T], wanted: str) -> _T | None:
        if isinstance(value, kind):
            return value
        if value is None:
            return None
        self.refuse(name, f"{wanted} is required, not {kind_of(value)}")
        return None


def kind_of(value: object) -> str:
    """Return the name of a JSON value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
    return "an object"


def _shown(value: int) -> str:
    # Python refuses to print numbers of thousands of digits.
    return str(value) if INT64[0] <= value <= INT64[1] else "the number"
