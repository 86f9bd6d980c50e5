"""TLS of the HTTP server, with the files of the gRPC server."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING

from runner_common.serving.tls import BadTlsFilesError, check_files, files_stamp

if TYPE_CHECKING:
    from runner_common.serving.tls import TlsFiles

logger = logging.getLogger(__name__)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context with the latest files for each new connection.

    While the files cannot be used, the last valid ones stay in use, as in the gRPC server.

    Raises:
        BadTlsFilesError: The files cannot be used now.
    """
    follower = _Follower(files)
    outer = follower.read()

    def choose(
        connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        connection.context = follower.latest()

    # Called in every handshake, also if the client names no server.
    outer.sni_callback = choose
    return outer


class _Follower:
    """Reads the TLS files after changes. Belongs to one event loop."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._tried = files_stamp(files)
        self._context: ssl.SSLContext | None = None

    def read(self) -> ssl.SSLContext:
        """Return a new context with the present files.

        Raises:
            BadTlsFilesError: The files cannot be used now.
        """
        files = self._files
        self._tried = files_stamp(files)
        check_files(files)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(files.client_ca)
        self._context = context
        return context

    def latest(self) -> ssl.SSLContext:
        """Return the context of a new connection."""
        if self._context is None or files_stamp(self._files) != self._tried:
            try:
                self.read()
            except (BadTlsFilesError, OSError) as error:
                # The message suffices, without a traceback.
                logger.error("%s; new connections use the previous files", error)  # noqa: TRY400
            else:
                logger.info("the TLS files have changed: new HTTP connections use the new ones")
        assert self._context is not None  # noqa: S101 - read once before
        return self._context
