"""``python -m runner_server``."""

from __future__ import annotations

import asyncio
import sys

from runner_server.adapter import MlxBackend
from runner_server.app import serve
from runner_server.config import parse_args
from runner_server.model_root import ModelRoot
from runner_server.request_log import set_up_logging


def main() -> int:
    """Runs the server; returns the exit code."""
    config = parse_args()
    set_up_logging(config.log_level, config.log_format)
    if config.distributed:
        from runner_server.distributed.start import run  # noqa: PLC0415 - only where it is wanted

        return run(config)
    root = ModelRoot(config.model_root) if config.model_root else None
    return asyncio.run(serve(config, MlxBackend(root)))


if __name__ == "__main__":
    sys.exit(main())
