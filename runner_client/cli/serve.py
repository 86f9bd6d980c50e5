"""``mlx-runner serve``: a server in the foreground, with the environment for MLX."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.server import Given, given_options, server_options
from runner_client.host.command import check_platform, server_program
from runner_client.host.environment import child_environment
from runner_common.host_memory.free import installed_backend
from runner_common.server_options import SERVER_OPTIONS
from runner_common.signals import hold_stop_signals, release_stop_signals

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command(
    "serve",
    short_help="Run a server in the foreground.",
    epilog="Exit codes: 0 success (Ctrl-C included), 1 it could not start, 2 wrong usage, 70 the "
    "engine died, 130 interrupted twice.",
)
@server_options()
@click.option(
    "--blas",
    default="auto",
    show_default=True,
    metavar="auto|off|PATH",
    help="BLAS library to preload before MLX's own, which is slow on a Linux CPU.",
)
def command(*, blas: str, **values: str | bool | tuple[str, ...] | None) -> None:
    """Run a server in the foreground until Ctrl-C.

    Once the server listens, it prints one line on standard output, 1|1|tcp|HOST:PORT|grpc; its log
    goes to standard error. This command becomes the server: it receives the signals, and its exit
    code is that of the server.
    """
    check_platform()
    given = given_options(values)
    environment = child_environment(os.environ, backend=installed_backend(), blas=blas)
    _become([*server_program(), *_arguments(given)], environment)


def _arguments(given: Given) -> Iterator[str]:
    """Yield the arguments of the server's command line."""
    for option in SERVER_OPTIONS:
        value = given.get(option.name, ())
        for each in value if isinstance(value, tuple) else (value,):
            yield option.flag
            if isinstance(each, str):
                yield each


def _become(line: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Signals stay pending until the server is able to handle them.
    hold_stop_signals()
    try:
        os.execve(line[0], line, environment)  # noqa: S606 - a shell is not wanted
    finally:
        release_stop_signals()
