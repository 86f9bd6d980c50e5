"""Startup: from the command line to a running server."""

from __future__ import annotations

import asyncio
import logging

from runner_common.memory.headroom import VariableError
from runner_common.serving.log import set_up_logging
from runner_server.app import EXIT_CANNOT_START, serve
from runner_server.config import parse_args
from runner_server.host.machine_admission import MachineAdmission
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend import MlxBackend

logger = logging.getLogger(__name__)


def run_server() -> int:
    """Run the server; return the exit code."""
    config = parse_args()
    set_up_logging(config.log_level, config.log_format)
    try:
        admission = MachineAdmission()
    except VariableError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message suffices
        return EXIT_CANNOT_START
    if config.distributed:
        from runner_server.launch_ranks import run  # noqa: PLC0415 - rarely needed

        return run(config, admission)
    root = ModelRoot(config.model_root) if config.model_root else None
    backend = MlxBackend(root, admission=admission, disk=config.prefix_disk)
    return asyncio.run(serve(config, backend, admission=admission))
