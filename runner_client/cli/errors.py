"""Presentation of failures to the users of the command line, people or scripts."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

import click

from runner_client.errors import RunnerError

if TYPE_CHECKING:
    from typing import IO, Any

EXIT_INTERRUPTED = 130
"""Exit code that a shell reports for a process ended by Ctrl-C: 128 + SIGINT."""

EXIT_CODES = (
    "Exit codes: 0 success, 1 failure (one line, or the runner's own last lines, on standard "
    "error), 2 wrong usage, 130 interrupted."
)


class Failure(click.ClickException):
    """Error printed as ``error: ...`` on standard error, with exit code 1."""

    exit_code: ClassVar[int] = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class Commands(click.Group):
    """Command group with messages instead of tracebacks for errors of the library."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands in the order useful to a newcomer, not sorted by name."""
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
            raise Failure(str(error)) from error
        except OSError as error:
            # click exits quietly if the reader of a pipe is gone.
            if error.errno == errno.EPIPE:
                raise
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
