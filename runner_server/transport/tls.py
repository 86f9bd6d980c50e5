"""TLS from files, read again when they change."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int] | None, ...]
"""What changes with each file; None for one that is not there."""


class BadTlsFilesError(Exception):
    """The files cannot be used; the message says which and why."""


@dataclass(frozen=True)
class TlsFiles:
    """Where a server's certificate lies.

    Attributes:
        cert: Its certificate, and those between it and the authority, as PEM.
        key: The certificate's private key, as PEM without a password.
        client_ca: Authorities of clients; with it a client without a certificate of one
            of them is refused.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files: each new connection gets what they hold then.

    Connections that are open stay as they were begun. While the files cannot be used, a
    new certificate that lies beside the old key for instance, the last good ones serve.

    Raises:
        BadTlsFilesError: They cannot be used now.
    """
    source = _Source(files)
    return grpc.dynamic_ssl_server_credentials(
        source.read(),
        source.fetch,  # type: ignore[arg-type]  # its documentation allows None
        require_client_authentication=files.client_ca is not None,
    )


class _Source:
    """The files, and what is known of them. gRPC asks on threads of its own."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._good: _Stamp | None = None
        self._bad: _Stamp | None = None

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What a new connection is to use; None leaves it as it is."""
        with self._lock:
            stamp = self._stamp()
            if stamp in (self._good, self._bad):
                return None
            try:
                configuration = self.read()
            except BadTlsFilesError as error:
                self._bad = stamp
                # The message is the whole story.
                logger.error("%s; new connections use what was there before", error)  # noqa: TRY400
                return None
        logger.info("the TLS files have changed: new connections use the new ones")
        return configuration

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Reads and checks the files.

        Raises:
            BadTlsFilesError: They cannot be used, or change right now.
        """
        stamp = self._stamp()
        files = self._files
        cert, key = _read(files.cert), _read(files.key)
        client_ca = _read(files.client_ca) if files.client_ca else None
        _check(files)
        if self._stamp() != stamp:
            raise BadTlsFilesError("the TLS files change while they are read")
        self._good = stamp
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)

    def _stamp(self) -> _Stamp:
        files = (self._files.cert, self._files.key, self._files.client_ca)
        return tuple(_identity(file) for file in files if file)


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadTlsFilesError(
            f"the TLS file {file} cannot be read: {error.strerror or error}"
        ) from error


def _check(files: TlsFiles) -> None:
    """Checks what gRPC would only find out in a handshake, and then tell nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password, even a wrong one, keeps OpenSSL from asking the terminal for it.
        context.load_cert_chain(files.cert, files.key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadTlsFilesError(
            f"{files.cert} and {files.key} are no certificate with its private key, as PEM without "
            f"a password: {error}"
        ) from error
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError) as error:
            raise BadTlsFilesError(f"{files.client_ca} has no certificate: {error}") from error
