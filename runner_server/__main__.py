"""Entry point of ``python -m runner_server``."""

from __future__ import annotations

import sys

from runner_common.interpreter import importing
from runner_common.signals import end_on_stop_signals, reset_inherited_signals


def main() -> int:
    """Run the server; return the exit code."""
    # Nothing has been set up yet, so a stop signal can end the process at once.
    end_on_stop_signals(0)
    reset_inherited_signals()
    with importing():
        from runner_server.launch import run_server  # noqa: PLC0415 - takes a quarter of a second

    return run_server()


if __name__ == "__main__":
    sys.exit(main())
