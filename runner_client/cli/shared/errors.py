"""Error messages and exit codes of the command line, for people and scripts."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, ClassVar

import click

from runner_client.cli.shared.flags import message_with_flags
from runner_client.cli.shared.output import is_terminal
from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    PromptTooLongError,
    RunnerError,
)
from runner_common.signals import EXIT_INTERRUPTED, SHOW_CURSOR, Interrupted

if TYPE_CHECKING:
    from typing import IO, Any

EXIT_TOO_LARGE = 3
"""Exit code for a model that does not fit into memory."""

EXIT_CODES = (
    "Exit codes: 0 success, 1 failure (one line, or the runner's own last lines, on standard "
    "error), 2 wrong usage, 3 the model does not fit into memory, 130 interrupted."
)


class Failure(click.ClickException):
    """Error printed as ``error: ...`` on standard error, with exit code 1."""

    exit_code: ClassVar[int] = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class Refusal(Failure):
    """Error of an option or argument refused by the library or the runner, with exit code 2."""

    exit_code: ClassVar[int] = 2


class TooLarge(Failure):
    """Error of a model too large for the available memory, with exit code 3."""

    exit_code: ClassVar[int] = EXIT_TOO_LARGE


class Commands(click.Group):
    """Command group with messages instead of tracebacks for errors of the library."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands in the order of registration, which suits a newcomer."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command.

        Raises:
            Failure: The command failed in a way that the library foresees.
            click.exceptions.Exit: The command was interrupted.
        """
        try:
            return super().invoke(ctx)
        except RunnerError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            raise _failure_kind(error)(message_with_flags(error, command)) from error
        except OSError as error:
            # click exits quietly if the reader of a pipe is gone.
            if error.errno == errno.EPIPE:
                raise
            raise Failure(str(error)) from error
        except (KeyboardInterrupt, Interrupted):
            if is_terminal():
                # Not click.echo, which removes escape sequences where colors are off.
                sys.stderr.write(SHOW_CURSOR)
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _failure_kind(error: RunnerError) -> type[Failure]:
    """Return the class with the exit code for an error of the library."""
    if isinstance(error, InsufficientMemoryError):
        return TooLarge
    # A prompt that is too long for the model is a failure, not wrong usage.
    if isinstance(error, InvalidRequestError) and not isinstance(error, PromptTooLongError):
        return Refusal
    return Failure
