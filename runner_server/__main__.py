"""``python -m runner_server``."""

from __future__ import annotations

import asyncio
import logging
import sys

from runner_server.adapter import MlxBackend
from runner_server.app import serve
from runner_server.config import parse_args


def main() -> int:
    """Runs the server; returns the exit code."""
    config = parse_args()
    logging.basicConfig(
        level=config.log_level,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return asyncio.run(serve(config, MlxBackend()))


if __name__ == "__main__":
    sys.exit(main())
