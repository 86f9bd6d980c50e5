"""Address, token and TLS options of commands for a running server."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

import click

from runner_client.rpc.client import RunnerClient
from runner_client.rpc.transport.address import ADDRESS_FORMS, parse_address
from runner_client.types import TlsFiles
from runner_common.contract import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.decorators import FC

_Client = TypeVar("_Client")


def runner_address(value: str) -> str:
    """Check and return the value of ``--address``.

    Raises:
        click.BadParameter: The value is not an address.
    """
    try:
        return parse_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def first_address(value: str) -> str:
    """Check and return an address given as the first argument.

    Raises:
        click.BadParameter: The value is not an address; the message says so if it is like a model.
    """
    try:
        return parse_address(value)
    except ValueError as error:
        if not _is_model(value):
            raise click.BadParameter(str(error)) from error
    raise click.BadParameter(
        f"{value!r} is a path or the hub id of a model; the address of the runner comes first: "
        f"{ADDRESS_FORMS}"
    )


def _is_model(value: str) -> bool:
    """Return whether a text names a file or directory, or looks like a hub id or a path."""
    try:
        # The path of a socket is an address that only lacks unix:.
        return not stat.S_ISSOCK(Path(value).stat().st_mode)
    except (OSError, ValueError):
        return "/" in value.lstrip("/") and ":" not in value


address_argument = click.argument("address", type=first_address)


def address_option(purpose: str) -> Callable[[FC], FC]:
    """Return the ``--address`` option, for a command that also works without a runner."""
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


def open_client(address: str, **credentials: Unpack[Credentials]) -> RunnerClient:
    """Create a client from the values of the options.

    Raises:
        click.UsageError: The options contradict each other, or the token cannot be sent.
        OSError: A file cannot be read.
    """
    return opened(RunnerClient, address, **credentials)


def opened(
    kind: Callable[..., _Client], address: str, **credentials: Unpack[Credentials]
) -> _Client:
    """Create a client of any kind from the values of the options, as ``open_client``."""
    tls_ca, tls_cert, tls_key = (credentials[name] for name in ("tls_ca", "tls_cert", "tls_key"))
    if tls_cert and not tls_ca:
        raise click.UsageError("--tls-cert needs --tls-ca")
    try:
        tls = TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca or tls_key else None
        return kind(address, token=_token(credentials["token_file"]), tls=tls)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _token(file: str | None) -> str | None:
    if file:
        return Path(file).read_text(encoding="utf-8").strip()
    return os.environ.get(TOKEN_VARIABLE) or None
