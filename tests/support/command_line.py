"""``mlx-runner`` run inside the test process, with stdout and stderr captured separately."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from runner_client.cli import main

if TYPE_CHECKING:
    from click.testing import Result


def invoke(
    *arguments: str,
    given: str | bytes | None = None,
    environment: dict[str, str] | None = None,
    color: bool = False,
) -> Result:
    """Run a command.

    Args:
        arguments: The subcommand and its arguments.
        given: Standard input.
        environment: Variables added to those of this process.
        color: Whether the output passes for a terminal with colors.
    """
    # click 8.1 and older mix stderr into stdout by default.
    has_one = "mix_stderr" in inspect.signature(CliRunner).parameters
    settings: dict[str, Any] = {"mix_stderr": False} if has_one else {}
    return CliRunner(**settings).invoke(main, arguments, input=given, env=environment, color=color)
