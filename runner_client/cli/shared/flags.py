"""Names of options in error messages that name fields of the protocol."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from runner_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_client.errors import RunnerError


def message_with_flags(error: RunnerError, command: click.Command | None) -> str:
    """Return the message of an error, with a command's options in place of fields.

    Fields named by a violation are replaced where they stand before its description. Elsewhere
    only names with an underscore are, because the others are words as well.
    """
    text = str(error)
    flags = _flags(command) if command is not None else {}
    if isinstance(error, InvalidRequestError):
        for field, _ in error.field_violations:
            flag = flags.get(_parameter(field))
            if flag:
                text = text.replace(f"{field}: ", f"{flag}: ", 1)
    names = [re.escape(name) for name in flags if "_" in name]
    if not names:
        return text
    # Not within a longer name or a path.
    pattern = rf"(?<![\w./-])(?:{'|'.join(names)})(?![\w/-]|\.\w)"
    return re.sub(pattern, lambda match: flags[match[0]], text)


def _parameter(field: str) -> str:
    """Return the last name of a field's path, without an index."""
    return field.rpartition(".")[2].partition("[")[0]


def _flags(command: click.Command) -> Mapping[str, str]:
    """Return the options and arguments of a command by the fields that they set."""
    # Several words on a command line are not one field.
    return {
        parameter.name: _spelling(parameter)
        for parameter in command.params
        if parameter.name and parameter.nargs == 1
    }


def _spelling(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name
