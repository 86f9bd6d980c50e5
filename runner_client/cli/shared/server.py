"""Options of commands that run a server, as in the table of the server's own command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from runner_common.server_options import SERVER_OPTIONS, ServerOption, misuse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_Result = TypeVar("_Result")

Given = dict[str, "str | bool | tuple[str, ...]"]
"""The options on the command line, by name, as text; True for a switch."""


def server_options(*names: str) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Add options of the server, whose values are checked but stay text.

    Args:
        names: Names of the options. Default: all.
    """
    wanted = [option for option in SERVER_OPTIONS if not names or option.name in names]

    def decorate(command: Callable[..., _Result]) -> Callable[..., _Result]:
        for option in reversed(wanted):
            command = _click_option(option)(command)
        return command

    return decorate


def given_options(values: Mapping[str, str | bool | tuple[str, ...] | None]) -> Given:
    """Return the options that were given.

    Raises:
        click.UsageError: An option lacks another one that it needs.
    """
    given = {name: value for name, value in values.items() if value not in {None, False, ()}}
    if problem := misuse(given):
        raise click.UsageError(problem)
    return {name: value for name, value in given.items() if value is not None}


def read_options(given: Given, names: Collection[str]) -> dict[str, Any]:
    """Return the converted values of options, with defaults for those that were not given."""
    values: dict[str, Any] = {}
    for option in SERVER_OPTIONS:
        if option.name in names:
            value = given.get(option.name, option.default)
            is_text = isinstance(value, str) and not option.choices
            values[option.name] = option.read(str(value)) if is_text else value
    return values


def _click_option(
    option: ServerOption,
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    if option.is_switch:
        return click.option(*option.flags, option.name, is_flag=True, help=option.help_text)
    kind = click.Choice(option.choices) if option.choices else _checked(option)
    metavar = option.metavar or None
    return click.option(
        *option.flags,
        option.name,
        type=kind,
        metavar=metavar,
        multiple=option.is_repeated,
        help=option.help_text,
    )


def _checked(option: ServerOption) -> Callable[[str], str]:
    """Return a click type that refuses what the server would refuse, and returns text as is."""

    def checked(text: str) -> str:
        try:
            option.read(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
        return text

    return checked
