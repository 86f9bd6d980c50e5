"""Startup of a pool's server: from the options of the command line to the end of the process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from runner_client.errors import InvalidRequestError
from runner_client.pool.serving.app import serve
from runner_client.pool.serving.config import PoolServerConfig
from runner_common.serving.auth import read_tokens
from runner_common.serving.log import set_up_logging
from runner_common.serving.tls import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_client.pool.scheduling.settings import PoolSettings


def run_server(settings: PoolSettings, blas: str, options: Mapping[str, Any]) -> int:
    """Run a pool's server until it is stopped; return the exit code if it cannot start.

    Args:
        settings: The settings of the pool.
        blas: BLAS library of the runners, as for ``RunnerProcess``.
        options: Values of the options of a server that a pool has too.

    Raises:
        InvalidRequestError: The tokens are unusable.
        OSError: A file of a token cannot be read.
    """
    try:
        token, use_token = read_tokens(options["token_file"], options["use_token_file"])
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    cert, key, client_ca = (options[f"tls_{name}"] for name in ("cert", "key", "client_ca"))
    config = PoolServerConfig(
        listen=options["listen"],
        settings=settings,
        tls=TlsFiles(cert, key, client_ca) if cert else None,
        token=token,
        use_token=use_token,
        exit_with_parent=bool(options["exit_with_parent"]),
        http=options["http"],
        metrics_listen=options["metrics_listen"],
        blas=blas,
    )
    set_up_logging(options["log_level"], options["log_format"])
    return asyncio.run(serve(config))
