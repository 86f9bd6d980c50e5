"""Runs ``mlx-runner`` inside the test, with both of its outputs apart."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from runner_client.cli import main

if TYPE_CHECKING:
    from click.testing import Result


def invoke(
    *arguments: str, given: str | bytes | None = None, environment: dict[str, str] | None = None
) -> Result:
    """Runs a command.

    Args:
        arguments: The command and what follows it.
        given: Its standard input.
        environment: Variables beside those of this process.
    """
    # Up to click 8.1 the outputs are one unless they are told apart.
    has_one = "mix_stderr" in inspect.signature(CliRunner).parameters
    settings: dict[str, Any] = {"mix_stderr": False} if has_one else {}
    return CliRunner(**settings).invoke(main, arguments, input=given, env=environment)
