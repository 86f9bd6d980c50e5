"""What a failure looks like to the person, or the script, that ran the command."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

import click

from runner_client.errors import RunnerError

if TYPE_CHECKING:
    from typing import IO, Any

EXIT_INTERRUPTED = 130
"""As a shell reports a process that Ctrl-C ended: 128 + SIGINT."""

EXIT_CODES = (
    "Exit codes: 0 success, 1 failure (one line, or the runner's own last lines, on standard "
    "error), 2 wrong usage, 130 interrupted."
)


class Failure(click.ClickException):
    """Ends the command with ``error: ...`` on standard error and exit code 1."""

    exit_code: ClassVar[int] = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the message."""
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class Commands(click.Group):
    """A group whose commands fail in words: the library's errors are written for people."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The commands in the order a newcomer meets them, not the alphabet's."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command.

        Raises:
            Failure: The command failed in a way that the library foresees.
            click.exceptions.Exit: It was interrupted.
        """
        try:
            return super().invoke(ctx)
        except RunnerError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            # click ends quietly when the reader of a pipe has gone.
            if error.errno == errno.EPIPE:
                raise
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
