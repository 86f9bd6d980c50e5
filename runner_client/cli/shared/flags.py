"""Translation of calls and fields in error messages to commands and options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, get_args

import click

from runner_client.errors import InsufficientMemoryError, InvalidRequestError
from runner_client.types import Dtype
from runner_common.contract import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_client.errors import RunnerError

_FORMAT = re.compile(rf"\bdtype (\"?)({'|'.join(get_args(Dtype))})\b\1")
"""A number format in advice: ``dtype "as_stored"`` or ``dtype float32``."""

_WAYS = (
    (re.compile(r"\bcall Load first\b"), "load one with `mlx-runner load ADDRESS MODEL`"),
    (
        re.compile(r"\bwait until Status says STATE_ACTIVE\b"),
        "wait until `mlx-runner status ADDRESS` says active",
    ),
    (
        re.compile(r"\bsend the runner's token in the metadata, as `authorization: Bearer TOKEN`"),
        f"give the runner's token by --token-file or {TOKEN_VARIABLE}",
    ),
    (re.compile(r"\(TlsFiles\)"), "(--tls-ca)"),
    # The command line has no options for timeouts.
    (re.compile(r",? or raise Timeouts\.\w+"), ""),
)
"""Advice to make a call, and the equivalent advice for the command line."""


def message_with_flags(error: RunnerError, command: click.Command | None) -> str:
    """Return the message of an error, with a command's options in place of fields.

    A field named by a violation is replaced in front of the violation's description. Elsewhere
    only names with an underscore are replaced, because the others are also ordinary words; in a
    message about memory, ``dtype`` and ``parallel`` are replaced as well. Advice to make a call
    becomes advice to run a command.
    """
    text = str(error)
    for call, command_line in _WAYS:
        text = call.sub(command_line, text)
    flags = _flags(command) if command is not None else {}
    if isinstance(error, InvalidRequestError):
        for field, _ in error.field_violations:
            flag = flags.get(_parameter(field))
            if flag:
                text = text.replace(f"{field}: ", f"{flag}: ", 1)
    if "dtype" in flags:
        text = _FORMAT.sub(r"--dtype \2", text)
    is_memory = isinstance(error, InsufficientMemoryError)
    if is_memory and "parallel" not in flags:
        text = text.replace("parallel, ", "")
    words = ("dtype", "parallel") if is_memory else ()
    names = [re.escape(name) for name in flags if "_" in name or name in words]
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
    # An argument of several words does not correspond to one field.
    return {
        parameter.name: _spelling(parameter)
        for parameter in command.params
        if parameter.name and parameter.nargs == 1
    }


def _spelling(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name
