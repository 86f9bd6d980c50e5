"""``mlx-runner trim``: have a runner free unneeded memory."""

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
from runner_client.cli.shared.options import json_option, size_or_zero
from runner_client.cli.shared.output import print_json
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Unpack


@click.command("trim", short_help="Have a runner free memory.", epilog=EXIT_CODES)
@address_argument
@click.option(
    "--prefix-cache",
    "prefix_cache_bytes",
    type=size_or_zero,
    metavar="SIZE",
    help="Shrink the prefix cache to this size; it may grow again.  [default: 0]",
)
@access_options
@json_option
def command(
    address: str,
    *,
    prefix_cache_bytes: int | None,
    as_json: bool,
    **credentials: Unpack[Credentials],
) -> None:
    """Have the runner at ADDRESS free memory.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path. The runner evicts entries of the prefix cache,
    then frees buffers kept for reuse. The model stays loaded, and completions continue.
    """
    with open_client(address, **credentials) as client:
        freed = client.trim(prefix_cache_bytes=prefix_cache_bytes)
    if as_json:
        print_json({"freed_bytes": freed})
    else:
        click.echo(f"{format_bytes(freed)} freed")
