"""Typed access to the JSON objects of requests."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from runner_common.serving.interceptor import UnreadableRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "an array",
    dict: "an object",
}
_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_NAME_CHARS = 60


class Fields:
    """A JSON object whose fields are read by name and type.

    A field that is null counts as absent, as in the original. Every method raises
    ``UnreadableRequestError`` with the field's path if its value cannot be used.

    Args:
        values: The object.
        path: Path of the object within the request; empty for the request itself.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """Return the path of a field within the request."""
        return f"{self._path}.{name}" if self._path else name

    def value(self, name: str) -> Any:  # noqa: ANN401 - any JSON
        """Return the value of a field of any type; None if absent."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """Return a string; None if absent."""
        found: str | None = self._typed(name, str)
        return found

    def flag(self, name: str) -> bool | None:
        """Return a boolean; None if absent."""
        found: bool | None = self._typed(name, bool)
        return found

    def number(self, name: str) -> float | None:
        """Return a number in the range of 32-bit floats; None if absent."""
        found: float | None = self._typed(name, float)
        if found is not None and not abs(found) <= _MAX_FLOAT32:
            self.refuse(name, "the number is too large")
        return None if found is None else float(found)

    def whole(self, name: str, bits: int = 32) -> int | None:
        """Return a whole number, perhaps written as ``2.0``; None if absent.

        Args:
            name: The field.
            bits: Size of the signed integers that can hold it.
        """
        found: float | None = self._typed(name, float)
        if found is None:
            return None
        if not math.isfinite(found) or found != int(found):
            self.refuse(name, f"must be {_KINDS[int]}")
        if not -(2 ** (bits - 1)) <= found < 2 ** (bits - 1):
            self.refuse(name, f"must fit {bits} bits")
        return int(found)

    def texts(self, name: str) -> list[str]:
        """Return an array of strings; empty if absent."""
        found: list[Any] = self._typed(name, list) or []
        for i, each in enumerate(found):
            if not isinstance(each, str):
                self.refuse(f"{name}[{i}]", f"must be {_KINDS[str]}")
        return found

    def inner(self, name: str) -> Fields | None:
        """Return an object; None if absent."""
        found: dict[str, Any] | None = self._typed(name, dict)
        return None if found is None else Fields(found, self.path(name))

    def inners(self, name: str) -> list[Fields]:
        """Return an array of objects; empty if absent."""
        found: list[Any] = self._typed(name, list) or []
        for i, each in enumerate(found):
            if not isinstance(each, dict):
                self.refuse(f"{name}[{i}]", f"must be {_KINDS[dict]}")
        return [Fields(each, self.path(f"{name}[{i}]")) for i, each in enumerate(found)]

    def json(self, name: str) -> str | None:
        """Return an object as the text of JSON; None if absent."""
        found: dict[str, Any] | None = self._typed(name, dict)
        if found is None:
            return None
        try:
            return json.dumps(found, ensure_ascii=False, allow_nan=False)
        except RecursionError:
            self.refuse(name, "is nested too deeply")
        except ValueError:
            self.refuse(name, "has a number that is too large")

    def refuse_set(self, names: Iterable[str], problem: str) -> None:
        """Refuse fields with a value, unless the value is empty."""
        for name in names:
            if self.value(name):
                self.refuse(name, problem)

    def finish(self, kind: str = "field") -> None:
        """Refuse the remaining fields.

        Args:
            kind: The word for a field in the message.
        """
        for name in self._values:
            if name not in self._read:
                self.refuse(name[:_MAX_NAME_CHARS], f"is not a {kind} that this server supports")

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Refuse the request because of a field.

        Raises:
            UnreadableRequestError: Always.
        """
        raise UnreadableRequestError([(self.path(name), problem)])

    def _typed(self, name: str, kind: type) -> Any:  # noqa: ANN401 - of the kind
        found = self.value(name)
        if found is None:
            return None
        # A boolean is a number in Python, and a whole number is one in JSON.
        wanted = (int, float) if kind is float else kind
        if not isinstance(found, wanted) or (isinstance(found, bool) and kind is not bool):
            self.refuse(name, f"must be {_KINDS[kind]}")
        return found
