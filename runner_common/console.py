"""Entry point of ``mlx-runner``.

Separate from the command line, whose import takes a quarter of a second, during which a container
may be asked to stop.
"""

from __future__ import annotations

import os

from runner_common.signals import end_on_stop_signals


def main() -> None:
    """Run the command line."""
    # Other processes keep the default actions, including KeyboardInterrupt on SIGINT.
    if os.getpid() == 1:
        end_on_stop_signals()
    from runner_client.cli import main as command  # noqa: PLC0415 - for that

    command()


if __name__ == "__main__":
    main()
