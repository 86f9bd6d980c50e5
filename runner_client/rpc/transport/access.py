"""Access to a server: the caller's token and the TLS credentials."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

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
            ValueError: The token cannot be sent; the message does not contain it.
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
    return grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.cert))


def _read(file: str | os.PathLike[str] | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
