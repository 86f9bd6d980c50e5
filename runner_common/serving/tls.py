"""TLS credentials from files, which are read again after changes."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and mtime of each file, to detect changes; None for a missing file."""


class BadTlsFilesError(Exception):
    """The TLS files cannot be used. The message names the file and the reason."""


@dataclass(frozen=True)
class TlsFiles:
    """Paths of a server's TLS files.

    Attributes:
        cert: The server's certificate and any intermediate certificates, as PEM.
        key: The certificate's private key, as PEM without a password.
        client_ca: CA certificates, as PEM. If set, clients must have a certificate signed by one
            of these CAs.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials that follow the files: each new connection uses the latest ones.

    Open connections are not affected. While the files cannot be used, for instance because a
    certificate has been replaced before its key, the last valid ones stay in use.

    Raises:
        BadTlsFilesError: The files cannot be used now.
    """
    source = _Source(files)
    return grpc.dynamic_ssl_server_credentials(
        source.read(),
        source.fetch,  # type: ignore[arg-type]  # its documentation allows None
        require_client_authentication=files.client_ca is not None,
    )


class _Source:
    """Reads the TLS files after changes; gRPC calls ``fetch`` on its own threads."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._good: _Stamp | None = None
        self._bad: _Stamp | None = None

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration for a new connection; None keeps the current one."""
        with self._lock:
            stamp = self._stamp()
            if stamp in (self._good, self._bad):
                return None
            try:
                configuration = self.read()
            except BadTlsFilesError as error:
                self._bad = stamp
                # The message suffices, without a traceback.
                logger.error("%s; new connections use the previous files", error)  # noqa: TRY400
                return None
        logger.info("the TLS files have changed: new connections use the new ones")
        return configuration

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files.

        Raises:
            BadTlsFilesError: The files cannot be used, or changed while being read.
        """
        stamp = self._stamp()
        files = self._files
        cert, key = _read(files.cert), _read(files.key)
        client_ca = _read(files.client_ca) if files.client_ca else None
        check_files(files)
        if self._stamp() != stamp:
            raise BadTlsFilesError("the TLS files changed while being read")
        self._good = stamp
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)

    def _stamp(self) -> _Stamp:
        return files_stamp(self._files)


def files_stamp(files: TlsFiles) -> _Stamp:
    """Return a stamp of the files, to detect changes."""
    return tuple(_identity(file) for file in (files.cert, files.key, files.client_ca) if file)


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


def check_files(files: TlsFiles) -> None:
    """Check that the files belong together; gRPC would only fail each handshake, without a reason.

    Raises:
        BadTlsFilesError: The files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Given a password, even a wrong one, OpenSSL does not ask for it on the terminal.
        context.load_cert_chain(files.cert, files.key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadTlsFilesError(
            f"{files.cert} and {files.key} are not a certificate and its private key, as PEM "
            f"without a password: {error}"
        ) from error
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError) as error:
            raise BadTlsFilesError(f"{files.client_ca} has no certificate: {error}") from error
