"""``mlx-runner`` from its first line on.

Apart from the command line, because importing that takes a quarter of a second in which a
container may be told to stop.
"""

from __future__ import annotations

import os

from runner_common.signals import end_on_stop_signals


def main() -> None:
    """Run the command line."""
    # Others have the default actions, and SIGINT as KeyboardInterrupt.
    if os.getpid() == 1:
        end_on_stop_signals()
    from runner_client.cli import main as command  # noqa: PLC0415 - for that

    command()


if __name__ == "__main__":
    main()
