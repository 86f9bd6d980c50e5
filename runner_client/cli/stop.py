"""``mlx-runner stop``: stop a runner of this machine."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click
import psutil

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_argument,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES, Failure
from runner_client.process.local_runner import local_process
from runner_client.settings import Timeouts

if TYPE_CHECKING:
    from typing import Unpack


@click.command("stop", short_help="Stop a runner of this machine.", epilog=EXIT_CODES)
@address_argument
@access_options
def command(address: str, **credentials: Unpack[Credentials]) -> None:
    """Stop the runner at ADDRESS and wait until its process has ended.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path. The runner must be on this machine and belong
    to this user. It refuses new work, ends its completions, frees the model and exits with 0.
    """
    with open_client(address, **credentials) as client:
        status = client.status()
    process = local_process(address, status)
    process.send_signal(signal.SIGINT)
    grace_seconds = Timeouts().close_grace_seconds(status.memory_usage.process_bytes)
    try:
        process.wait(grace_seconds)
    except psutil.TimeoutExpired:
        raise Failure(
            f"process {process.pid} has not ended after {grace_seconds:.0f} s; another SIGINT ends "
            "it at once"
        ) from None
    click.echo(f"process {process.pid} has ended")
