"""Binding of the server to an address: TCP ports, unix sockets, and what each requires."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import grpc

from runner_common.contract import MAX_PORT, MAX_REQUEST_BYTES, TOKEN_VARIABLE
from runner_common.handshake import ReadyLine
from runner_common.serving.auth import is_loopback
from runner_common.serving.tls import BadTlsFilesError, TlsFiles, server_credentials
from runner_common.serving.unix_socket import OccupiedError, socket_place

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    # With SO_REUSEPORT a second server would share the port without an error.
    ("grpc.so_reuseport", 0),
    # Prompts can be megabytes; gRPC's default is 4 MiB.
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # Calls received but not accepted yet. By default gRPC silently cancels random ones above 1,000.
    # With a higher limit, the engine's queue refuses them instead, with a time to retry.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    # Clients in every language may ping a silent stream. By default gRPC answers "too many
    # pings" and closes the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)
"""Options of every server."""

_MAX_UNIX_PATH = 107 if sys.platform == "linux" else 103
_BIND_ADVICE = "it is in use, unknown, or another machine's; port 0 takes any free port"


class CannotListenError(Exception):
    """The server cannot listen on the address, or cannot start for another reason."""


def listen(
    server: grpc.aio.Server, address: str, *, tls: TlsFiles | None, has_token: bool
) -> ReadyLine:
    """Bind a server to an address.

    Args:
        server: A server that has not started yet.
        address: ``HOST:PORT`` (port 0 = any free one) or ``unix:/path``.
        tls: Certificate and key; None does not encrypt.
        has_token: Whether callers must send a token.

    Returns:
        The bound address, with the port that was chosen.

    Raises:
        CannotListenError: The address is invalid, in use, or open to other machines without
            authentication; or the certificate cannot be used.
    """
    try:
        credentials = server_credentials(tls) if tls else None
    except BadTlsFilesError as error:
        raise CannotListenError(str(error)) from error
    path = address.removeprefix("unix:")
    if path != address:
        return _listen_on_socket(server, Path(path), address, credentials)
    host, separator, port = address.rpartition(":")
    # gRPC would wrap a larger port number and accept "::1:80" as an address.
    is_port = port.isdecimal() and int(port) <= MAX_PORT
    is_host = host and (":" not in host or (host[0], host[-1]) == ("[", "]"))
    if not (separator and is_host and is_port):
        raise CannotListenError(
            f"--listen {address!r}: expected HOST:PORT or [IPV6]:PORT, the port 0 to {MAX_PORT}, "
            "or unix:/path"
        )
    check_reach(host, address, tls, has_token=has_token)
    return ReadyLine("tcp", f"{host}:{_bind(server, address, _BIND_ADVICE, credentials)}")


def _listen_on_socket(
    server: grpc.aio.Server, path: Path, address: str, credentials: grpc.ServerCredentials | None
) -> ReadyLine:
    _check_length(path)
    try:
        with socket_place(path):
            _bind_socket(server, address, credentials)
    except OccupiedError as error:
        raise CannotListenError(str(error)) from error
    return ReadyLine("unix", address.removeprefix("unix:"))


def _bind_socket(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None
) -> None:
    # The umask sets the mode of the socket's file, so that only this user may connect.
    mask = os.umask(0o177)
    try:
        _bind(server, address, "its directory must exist and be writable", credentials)
    finally:
        os.umask(mask)


def check_reach(
    host: str, address: str, tls: TlsFiles | None, *, has_token: bool, flag: str = "--listen"
) -> None:
    """Refuse an address open to other machines without authentication.

    Args:
        host: The host of the address.
        address: The address, for messages.
        tls: Certificate and key; None does not encrypt.
        has_token: Whether callers must send a token.
        flag: The option that has the address.

    Raises:
        CannotListenError: The host is unknown, or open to other machines without authentication.
    """
    try:
        if is_loopback(host):
            return
    except (OSError, ValueError) as error:  # ValueError: not a valid host name
        raise CannotListenError(f"cannot listen on {address}: {_BIND_ADVICE}") from error
    if not (tls or has_token):
        raise CannotListenError(
            f"{flag} {address} is open to other machines, where anyone could load models and "
            f"read completions. Set a token (--token-file FILE, or {TOKEN_VARIABLE}) and "
            "encrypt (--tls-cert FILE --tls-key FILE), or accept only clients with a certificate "
            "(add --tls-client-ca FILE); or listen on 127.0.0.1 or unix:/path"
        )
    if not tls:
        logger.warning(
            "%s is open to other machines without TLS: the token and all text are sent in the "
            "clear, and anyone who sees the token can use it; --tls-cert and --tls-key encrypt",
            address,
        )
    elif not (has_token or tls.client_ca):
        logger.warning(
            "%s is open to other machines without authentication: TLS alone only encrypts; "
            "set a token or --tls-client-ca",
            address,
        )


def _bind(
    server: grpc.aio.Server,
    address: str,
    advice: str,
    credentials: grpc.ServerCredentials | None,
) -> int:
    try:
        if credentials:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise CannotListenError(f"cannot listen on {address}: {advice}") from error


def _check_length(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > _MAX_UNIX_PATH:
        raise CannotListenError(
            f"the socket's path has {size} bytes and this system allows {_MAX_UNIX_PATH}: {path}"
        )
