"""Token and TLS options for the commands calling a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from runner_client.rpc.client import RunnerClient
from runner_client.rpc.transport.address import ADDRESS_FORMS, parse_address
from runner_client.types import TlsFiles
from runner_common.contract import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.decorators import FC


def runner_address(value: str) -> str:
    """Check the address of a runner together with the other arguments.

    Raises:
        click.BadParameter: The value is not an address.
    """
    try:
        return parse_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


address_argument = click.argument("address", type=runner_address)


def address_option(purpose: str) -> Callable[[FC], FC]:
    """Return the option for a runner, in a command that can do without one."""
    return click.option(
        "--address",
        type=runner_address,
        metavar="ADDRESS",
        help=f"{purpose}: {ADDRESS_FORMS}.",
    )


class Credentials(TypedDict):
    """Values of ``access_options``."""

    token_file: str | None
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None


_FILE = click.Path(exists=True, dir_okay=False)
_ACCESS = (
    click.option(
        "--token-file",
        type=_FILE,
        help=f"File with the runner's token.  [default: {TOKEN_VARIABLE} if set]",
    ),
    click.option("--tls-ca", type=_FILE, help="Encrypt; CA certificates to trust the runner by."),
    click.option("--tls-cert", type=_FILE, help="Client certificate, if the runner asks for one."),
    click.option("--tls-key", type=_FILE, help="Private key of --tls-cert."),
)


def access_options(command: FC) -> FC:
    """Add the token and TLS options.

    The token itself is not an option, because other users can read a command line.
    """
    for option in reversed(_ACCESS):
        command = option(command)
    return command


def open_client(
    address: str,
    *,
    token_file: str | None,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> RunnerClient:
    """Create a client from the values of the options.

    Raises:
        click.UsageError: The options contradict each other, or the token cannot be sent.
        OSError: A file cannot be read.
    """
    if tls_cert and not tls_ca:
        raise click.UsageError("--tls-cert needs --tls-ca")
    try:
        tls = TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca or tls_key else None
        return RunnerClient(address, token=_token(token_file), tls=tls)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _token(file: str | None) -> str | None:
    if file:
        return Path(file).read_text(encoding="utf-8").strip()
    return os.environ.get(TOKEN_VARIABLE) or None
