"""Entry point of ``mlx-runner``.

Separate from the command line, whose import takes a quarter of a second, during which Ctrl-C or a
container may stop the process.
"""

from __future__ import annotations

import os

from runner_common.signals import (
    end_on_interrupt,
    end_on_stop_signals,
    ignore_interrupts,
    raise_on_interrupt,
    reset_inherited_signals,
)


def main() -> None:
    """Run the command line."""
    # Other processes keep the default action of SIGTERM.
    if os.getpid() == 1:
        end_on_stop_signals()
    end_on_interrupt()
    # A blocked SIGINT that came before is delivered now.
    reset_inherited_signals()
    from runner_client.cli import main as command  # noqa: PLC0415 - for that

    raise_on_interrupt()
    try:
        command()
    finally:
        # The command is over: its own exit code counts, and exit handlers expect no exceptions.
        # Python's last steps would reset a handler to the default action, which kills.
        ignore_interrupts()


if __name__ == "__main__":
    main()
