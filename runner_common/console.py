"""Entry point of ``mlx-runner``.

It sets up signals before it imports the command line, because that takes a quarter of a second, in
which Ctrl-C or a container may stop the process.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runner_common.interpreter import importing
from runner_common.signals import (
    end_on_interrupt,
    end_on_stop_signals,
    ignore_interrupts,
    raise_on_interrupt,
    reset_inherited_signals,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_GRPC_VERBOSITY = "GRPC_VERBOSITY"


@contextmanager
def _quiet_grpc() -> Iterator[None]:
    """Keep gRPC's own log lines off standard error, unless the user asked for them.

    gRPC reads the variable when it is imported, so servers started later do not inherit it.
    """
    if _GRPC_VERBOSITY in os.environ:
        yield
        return
    os.environ[_GRPC_VERBOSITY] = "NONE"
    try:
        yield
    finally:
        del os.environ[_GRPC_VERBOSITY]


def main() -> None:
    """Run the command line."""
    # The kernel drops signals to process 1 that have no handler. SIGTERM ends other processes.
    if os.getpid() == 1:
        end_on_stop_signals()
    end_on_interrupt()
    # Delivers a SIGINT that was blocked until now.
    reset_inherited_signals()
    with _quiet_grpc(), importing():
        from runner_client.cli import main as command  # noqa: PLC0415 - slow

    raise_on_interrupt()
    try:
        command()
    finally:
        # The command has ended, so its exit code counts, and exit handlers expect no exceptions.
        # With a handler, Python's last steps would restore the default action, which kills.
        ignore_interrupts()


if __name__ == "__main__":
    main()
