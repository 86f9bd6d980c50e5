"""``mlx-runner unload``: free the model of a running runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_argument,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import json_option
from runner_client.cli.shared.output import print_json
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Unpack


@click.command("unload", short_help="Free the model of a running runner.", epilog=EXIT_CODES)
@address_argument
@access_options
@json_option
def command(address: str, *, as_json: bool, **credentials: Unpack[Credentials]) -> None:
    """End the completions of the runner at ADDRESS and free its model.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path. The runner keeps running and waits for the
    next load; stop ends the runner itself.
    """
    with open_client(address, **credentials) as client:
        freed = client.unload()
    if as_json:
        print_json({"freed_bytes": freed})
    else:
        click.echo(f"{format_bytes(freed)} freed")
