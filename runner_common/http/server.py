"""The HTTP server, on the event loop of the gRPC server.

Imports uvicorn, of the extra ``http``.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import uvicorn

from runner_common.http.app import make_app
from runner_common.http.guard import Guard
from runner_common.http.tls import server_context
from runner_common.serving.listen import CannotListenError, check_reach
from runner_common.serving.tls import BadTlsFilesError

if TYPE_CHECKING:
    from runner_common.http.host import Host
    from runner_common.serving.tls import TlsFiles

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than clients keep theirs, so that none sends a
request just as the connection is being closed."""

_GRACE_SECONDS = 1
"""Time for responses to end at shutdown, when the engine has ended all requests. uvicorn takes
whole seconds."""

_BACKLOG = 2048


class HttpServer:
    """Serves a host over HTTP.

    Args:
        host: The runner or pool that answers.
        tls: Certificate and key, as of the gRPC server; None does not encrypt.
        token: Token required of callers; None requires none.
        use_token: Second token, whose holders may only use models; None if there is none.

    Attributes:
        url: The URL, once it listens.
    """

    def __init__(
        self, host: Host, tls: TlsFiles | None, token: str | None, use_token: str | None
    ) -> None:
        self.url = ""
        self._tls = tls
        self._has_token = token is not None
        guard = Guard(token, use_token, is_encrypted=tls is not None)
        config = uvicorn.Config(
            make_app(host, guard),
            # Bounds the size of headers, unlike httptools.
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        config.load()
        self._config = config
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._socket: socket.socket | None = None
        # Its messages about the start and the end are for servers of its own.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

    async def start(self, host: str, port: int) -> None:
        """Listen and answer requests.

        Args:
            host: Host name or address.
            port: The port; 0 = any free one.

        Raises:
            CannotListenError: The address is invalid, in use, or open to other machines without
                authentication; or the TLS files cannot be used.
        """
        shown = f"[{host}]" if ":" in host else host
        address = f"{shown}:{port}"
        check_reach(host, address, self._tls, has_token=self._has_token, flag="--http")
        try:
            self._config.ssl = server_context(self._tls) if self._tls else None
            self._socket = _bind(host, port)
        except BadTlsFilesError as error:
            raise CannotListenError(str(error)) from error
        except OSError as error:
            raise CannotListenError(f"--http {address}: {error.strerror or error}") from error
        # Not `serve`, which would take over the signals of the process and wake up ten times a
        # second.
        await self._server.startup(sockets=[self._socket])
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://{shown}:{self._socket.getsockname()[1]}"
        logger.info("http on %s", self.url)

    async def stop(self) -> None:
        """Close idle connections, wait a moment for responses, and close the rest."""
        if self._server.started:
            await self._server.shutdown(sockets=[self._socket] if self._socket else None)


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(address, family=family, backlog=_BACKLOG)
