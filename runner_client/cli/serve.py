"""``mlx-runner serve``: a server in the foreground, with the environment for MLX."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from runner_client.cli.options import load_options, refuse_options
from runner_client.host.command import check_platform, server_program
from runner_client.host.environment import child_environment
from runner_common.contract import TOKEN_VARIABLE
from runner_common.host_memory.free import installed_backend
from runner_common.import_paths import with_import_paths
from runner_common.signals import hold_stop_signals, release_stop_signals

if TYPE_CHECKING:
    from runner_client.types import LoadOptions

_FILE = click.Path(exists=True, dir_okay=False)
_FOR_A_MODEL = (
    *("context_length", "parallel", "dtype"),
    *("memory_limit_bytes", "prefix_cache_bytes"),
)


@click.command(
    "serve",
    short_help="Run a server in the foreground.",
    epilog="Exit codes: 0 success (Ctrl-C included), 1 it could not start, 2 wrong usage, 70 the "
    "engine died, 130 interrupted twice.",
)
@click.option(
    "--model", help="Model to load at the start; without it the server waits for a Load call."
)
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    help="HOST:PORT or unix:/path; port 0 picks a free one. An address reachable from other "
    "machines needs a token or TLS.",
)
@click.option(
    "--token-file",
    type=_FILE,
    help=f"File with the token that every call must send.  [default: {TOKEN_VARIABLE} if set]",
)
@click.option("--tls-cert", type=_FILE, help="Certificate chain, PEM; reloaded when it changes.")
@click.option("--tls-key", type=_FILE, help="Private key of --tls-cert, PEM without a password.")
@click.option(
    "--tls-client-ca", type=_FILE, help="CA certificates; clients must have one signed by them."
)
@click.option(
    "--model-root",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Only load models below this directory; links are resolved.",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Address for Prometheus metrics, such as 127.0.0.1:9464.  [default: none]",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Format of the log on standard error.  [default: text]",
)
@click.option(
    "--distributed",
    is_flag=True,
    help="Hold the model together with the other processes started by mlx.launch.",
)
@click.option(
    "--pipeline",
    is_flag=True,
    help="With --distributed, give each process some layers of the model.",
)
@click.option(
    "--smg", is_flag=True, help="Also serve as a worker of the SMG gateway; needs the extra smg."
)
@load_options(*_FOR_A_MODEL)
@click.option(
    "--blas",
    default="auto",
    show_default=True,
    metavar="auto|off|PATH",
    help="BLAS library to preload before MLX's own, which is slow on a Linux CPU.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    model: str | None,
    listen: str,
    load: LoadOptions,
    blas: str,
    distributed: bool,
    pipeline: bool,
    smg: bool,
    **others: str | None,
) -> None:
    """Run a server in the foreground until Ctrl-C.

    Once the server listens, it prints one line on standard output, 1|1|tcp|HOST:PORT|grpc; its log
    goes to standard error. This command becomes the server: it receives the signals, and its exit
    code is that of the server.
    """
    check_platform()
    # No --exit-with-parent: a server started by hand may outlive its shell.
    line = server_program(listen)
    if model is None:
        # A Load call would override each of them.
        refuse_options(ctx, _FOR_A_MODEL, "needs --model")
    else:
        line += ["--model", model, "--parallel", str(load.parallel), "--dtype", load.dtype]
        line += _given("--context-length", load.context_length)
        line += _given("--memory-limit-bytes", load.memory_limit_bytes)
        line += _given("--prefix-cache-bytes", load.prefix_cache_bytes)
    switches = {"--distributed": distributed, "--pipeline": pipeline, "--smg": smg}
    line += [name for name, is_on in switches.items() if is_on]
    for name, value in others.items():
        line += _given(f"--{name.replace('_', '-')}", value)
    environment = child_environment(os.environ, backend=installed_backend(), blas=blas)
    _become(line, with_import_paths(environment))


def _given(name: str, value: int | str | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _become(line: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # The server handles the signals as soon as it is able to.
    hold_stop_signals()
    try:
        os.execve(line[0], line, environment)  # noqa: S606 - a shell is not wanted
    finally:
        release_stop_signals()
