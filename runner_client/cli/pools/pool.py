"""``mlx-runner pool``: many models behind one address, in the foreground."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from runner_client.cli.shared.options import size
from runner_client.cli.shared.server import given_options, read_options, server_options
from runner_client.host.command import check_platform, server_program
from runner_client.pool.scheduling.settings import PoolSettings

_OPTIONS = (
    *("listen", "exit_with_parent", "token_file", "use_token_file"),
    *("tls_cert", "tls_key", "tls_client_ca", "http", "metrics_listen", "log_level", "log_format"),
)


@click.command(
    "pool",
    short_help="Serve many models on one address.",
    epilog="Exit codes: 0 success (Ctrl-C included), 1 it could not start, 2 wrong usage, 130 "
    "interrupted twice.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="TOML file with the budget and the models; see docs/pool.md.",
)
@click.option(
    "--budget",
    type=size,
    metavar="SIZE",
    help="Most memory that all runners may take together, such as 24GiB.  [default: that of the "
    "file, or what the machine can give]",
)
@server_options(*_OPTIONS)
@click.option(
    "--blas",
    default="auto",
    show_default=True,
    metavar="auto|off|PATH",
    help="BLAS library to preload before MLX's own, which is slow on a Linux CPU.",
)
def command(
    *, config: str | None, budget: int | None, blas: str, **values: str | bool | None
) -> None:
    """Serve many models on one address until Ctrl-C.

    Each model has a runner of its own, which is started by the first request for the model, and
    stopped when its memory is needed or after it has been idle. Once the pool listens, it prints
    one line on standard output, 1|1|tcp|HOST:PORT|grpc; its log goes to standard error.
    """
    check_platform()
    # Raises if the server's packages are not installed, which also serve the pool.
    server_program()
    settings = PoolSettings.from_file(config) if config else PoolSettings()
    if budget is not None:
        settings = replace(settings, budget_bytes=budget)
    options = read_options(given_options(values), _OPTIONS)
    from runner_client.pool.serving.launch import run_server  # noqa: PLC0415 - needs the extra

    sys.exit(run_server(settings, blas, options))
