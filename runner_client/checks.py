"""Validation of arguments, with the name of the argument and the value in each error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from typing import NoReturn

from runner_client.errors import InvalidRequestError
from runner_common.units import parse_bytes

_SHOWN_CHARS = 40


def refuse_type(field: str, value: object, form: str, instead: object = None) -> NoReturn:
    """Raise a ``TypeError`` for a value of the wrong type.

    Args:
        field: Name of the argument.
        value: The value.
        form: Description of a valid value, such as ``"a whole number"``.
        instead: The value that was probably meant; None if that is unknown.

    Raises:
        TypeError: Always.
    """
    shown = repr(value)
    if len(shown) > _SHOWN_CHARS:
        shown = f"{shown[:_SHOWN_CHARS]}..."
    advice = "" if instead is None else f": write {field}={instead!r}"
    raise TypeError(f"{field} is {form}, not {shown} ({type(value).__name__}){advice}")


def check_integer(field: str, value: object, low: int | None = None, high: int = 0) -> None:
    """Require a whole number or None, in the range ``low`` to ``high`` if ``low`` is given.

    Raises:
        TypeError: The value is not a whole number.
        InvalidRequestError: The number is out of range.
    """
    if value is None:
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse_type(field, value, "a whole number", _number_in(value, is_size="bytes" in field))
    number = value.__index__()
    if low is not None and not low <= number <= high:
        text = f"{number:,} is not in the range {low:,} to {high:,}"
        raise InvalidRequestError(f"{field}: {text}", field_violations=[(field, text)])


def _number_in(value: object, *, is_size: bool) -> int | None:
    """Return the whole number that a value stands for; None if it stands for none."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str):
        return None
    try:
        return parse_bytes(value) if is_size else int(value)
    except ValueError:
        return None


def check_number(field: str, value: object) -> None:
    """Require a number or None.

    Raises:
        TypeError: The value is not a number.
    """
    if value is None or hasattr(value, "__float__") or hasattr(value, "__index__"):
        return
    try:
        instead = float(value) if isinstance(value, str) else None
    except ValueError:
        instead = None
    refuse_type(field, value, "a number", instead)


def check_seconds(field: str, value: float | None, low: float, high: float) -> None:
    """Require a number of seconds in a range, or None.

    Raises:
        TypeError: The value is not a number.
        InvalidRequestError: The number is out of range.
    """
    check_number(field, value)
    # NaN compares false, so it is refused too.
    if value is not None and not low <= value <= high:
        text = f"{value:g} s is not in the range {low:g} s to {high:g} s"
        raise InvalidRequestError(f"{field}: {text}", field_violations=[(field, text)])


def check_text(field: str, value: object, form: str = "text (str)") -> None:
    """Require a string.

    Raises:
        TypeError: The value is not a string.
    """
    if isinstance(value, bytes):
        refuse_type(field, value, form, value.decode(errors="replace"))
    if not isinstance(value, str):
        refuse_type(field, value, form)


def check_model(value: object, field: str = "model") -> None:
    """Require the name of a model as a string.

    Raises:
        TypeError: The value is not a string.
    """
    form = "the path of a directory or a hub id, as text (str)"
    if hasattr(value, "__fspath__"):
        refuse_type(field, value, form, value.__fspath__())
    check_text(field, value, form)


def check_names(field: str, value: object) -> None:
    """Require a mapping from names to directories, as strings.

    Raises:
        TypeError: The value is of another type.
    """
    if not isinstance(value, Mapping):
        refuse_type(field, value, "a mapping from names to directories")
    for name, path in value.items():
        check_text(f"a name in {field}", name)
        if hasattr(path, "__fspath__"):
            refuse_type(f"{field}[{name!r}]", path, "text (str)", path.__fspath__())
        check_text(f"{field}[{name!r}]", path)


def check_path(field: str, value: object) -> None:
    """Require the path of a file or None; the file need not exist.

    Raises:
        TypeError: The value is not a path.
    """
    if value is not None and not isinstance(value, str | PathLike):
        refuse_type(field, value, "the path of a file")


def check_flag(field: str, value: object) -> None:
    """Require a truth value.

    Raises:
        TypeError: The value is not a truth value but, for instance, the string ``"no"``.
    """
    if not hasattr(value, "__bool__"):
        refuse_type(field, value, "True or False")


def check_callable(field: str, value: object) -> None:
    """Require a callable or None.

    Raises:
        TypeError: The value cannot be called.
    """
    if value is not None and not callable(value):
        refuse_type(field, value, "a function")


def check_choice(field: str, value: object, choices: Collection[str | int]) -> None:
    """Require one of ``choices``.

    Raises:
        InvalidRequestError: The value is not one of them.
    """
    if value not in choices:
        text = f"{value!r} is not one of {', '.join(map(str, choices))}"
        raise InvalidRequestError(f"{field}: {text}", field_violations=[(field, text)])


def check_environment(field: str, value: object) -> None:
    """Require a mapping from names of environment variables to strings, or None.

    Raises:
        TypeError: The value is not a mapping from strings to strings.
    """
    if value is None:
        return
    if not isinstance(value, Mapping):
        refuse_type(field, value, "a mapping from names to texts")
    for name, text in value.items():
        check_text(f"a name in {field}", name)
        check_text(f"{field}[{name!r}]", text)


def check_kind(field: str, value: object, kind: type) -> None:
    """Require an instance of a class of this library, or None.

    Raises:
        TypeError: The value is not an instance of ``kind``.
    """
    if value is None or isinstance(value, kind):
        return
    form = f"an object of the class {kind.__name__}"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        fields = ", ".join(f"{key}={item!r}" for key, item in value.items())
        raise TypeError(
            f"{field} is {form}, not a {type(value).__name__}: write "
            f"{field}={kind.__name__}({fields})"
        )
    refuse_type(field, value, form)


def check_texts(field: str, value: object) -> None:
    """Require a sequence of strings or None.

    Raises:
        TypeError: The value is a single string, or not a sequence of strings.
    """
    if isinstance(value, str):
        # A string is a sequence too: each of its characters would count as an item.
        raise TypeError(f"{field} is a sequence of strings: write {field}=({value!r},)")
    if value is None:
        return
    if isinstance(value, bytes) or not isinstance(value, Collection):
        refuse_type(field, value, "a sequence of strings")
    for i, item in enumerate(value):
        check_text(f"{field}[{i}]", item)


def check_bias(field: str, value: object) -> None:
    """Require a mapping from token ids to numbers, or None.

    Raises:
        TypeError: The value is not such a mapping.
    """
    if value is None:
        return
    if not isinstance(value, Mapping):
        refuse_type(field, value, "a mapping from token ids to numbers, such as {42: -100.0}")
    for token_id, bias in value.items():
        check_integer(f"a token id of {field}", token_id)
        check_number(f"{field}[{token_id}]", bias)


def check_ids(field: str, value: object, form: str = "a sequence of token ids") -> None:
    """Require a sequence of token ids. The items of an iterator are not checked.

    Raises:
        TypeError: The value is not a sequence of whole numbers.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        refuse_type(field, value, form)
    if isinstance(value, Collection) and not set(map(type, value)) <= {int}:
        for i, item in enumerate(value):
            check_integer(f"{field}[{i}]", item)
