"""Access to a server: the caller's token and the TLS credentials."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from runner_client.checks import check_path

if TYPE_CHECKING:
    from runner_client.types import TlsFiles

_TOKEN = re.compile(r"[!-~]+")

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Access:
    """Headers of every call and the credentials of a channel."""

    metadata: Metadata | None = field(repr=False)
    """Headers of every call."""
    credentials: grpc.ChannelCredentials | None
    """None for an unencrypted channel."""

    @classmethod
    def of(cls, token: str | None, tls: TlsFiles | None) -> Access:
        """Validate a token and read the certificate files.

        Raises:
            ValueError: The token cannot be sent (the message does not contain it), or a file has no
                certificate or key.
            OSError: A file cannot be read.
        """
        if token is None:
            return cls(None, _credentials(tls))
        if not _TOKEN.fullmatch(token):
            raise ValueError("a token must be visible ASCII without spaces, and not empty")
        return cls((("authorization", f"Bearer {token}"),), _credentials(tls))


def _credentials(tls: TlsFiles | None) -> grpc.ChannelCredentials | None:
    if tls is None:
        return None
    for name, file in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)):
        check_path(f"tls.{name}", file)
    files = _read(tls.ca), _read(tls.key), _read(tls.cert)
    _check(tls)
    return grpc.ssl_channel_credentials(*files)


def _check(tls: TlsFiles) -> None:
    """Check the certificate files; gRPC would fail each handshake without giving a reason.

    Raises:
        ValueError: A file has no certificate or key in PEM form, or the two do not match.
        OSError: A file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca is not None:
        try:
            context.load_verify_locations(tls.ca)
        except ssl.SSLError as error:
            raise ValueError(f"{os.fspath(tls.ca)} has no certificate in PEM form") from error
    if tls.cert is not None and tls.key is not None:
        try:
            # Given a password, even a wrong one, OpenSSL does not ask for it on the terminal.
            context.load_cert_chain(tls.cert, tls.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(tls.cert)} and {os.fspath(tls.key)} are not a certificate and its "
                "private key, as PEM without a password"
            ) from error


def _read(file: str | os.PathLike[str] | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
