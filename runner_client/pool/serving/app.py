"""Assembly of a pool's server: pool, services, listening address, signals and shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mlxrunner.v1 import pool_pb2_grpc
from runner_client.errors import RunnerError
from runner_client.memory.gate import MemoryGate
from runner_client.pool.aio_pool import AsyncRunnerPool
from runner_client.pool.serving import pool_service, runner_service
from runner_client.pool.serving.completions import Completions
from runner_client.pool.serving.forward import Forwarder
from runner_client.pool.serving.names import ModelNames
from runner_client.pool.serving.pool_service import PoolServicer
from runner_client.pool.serving.runner_service import PooledRunnerService
from runner_client.pool.serving.translate import translate
from runner_common.contract import HEALTH_SERVICES, POOL_SERVICE_NAME, SERVICE_NAME
from runner_common.extras import install_advice
from runner_common.serving.auth import AuthInterceptor, is_loopback
from runner_common.serving.go_plugin import add_controller
from runner_common.serving.interceptor import ErrorInterceptor
from runner_common.serving.lifetime import announce, exit_at_once, install_signals
from runner_common.serving.listen import CHANNEL_OPTIONS, CannotListenError, listen
from runner_common.serving.orphan_guard import OrphanGuard
from runner_common.serving.reflection import add_reflection

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_client.pool.serving.config import PoolServerConfig
    from runner_client.pool.serving.http_host import PoolHost
    from runner_client.pool.serving.metrics import PoolMetrics
    from runner_common.handshake import ReadyLine
    from runner_common.http.server import HttpServer

logger = logging.getLogger(__name__)

EXIT_CANNOT_START = 1
"""Exit code when the address cannot be bound."""

_STREAM_GRACE_SECONDS = 0.5
_SERVICES = (SERVICE_NAME, POOL_SERVICE_NAME)
_METHODS = runner_service.METHODS | pool_service.METHODS


class PoolApp:
    """A server with its pool, from start to shutdown.

    Create instances on the running event loop.

    Args:
        config: Configuration of the server.
    """

    def __init__(self, config: PoolServerConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._health = health.aio.HealthServicer()
        environ = dict(os.environ)
        gate = MemoryGate(environ=environ)
        self.pool = AsyncRunnerPool(config.settings, gate=gate, blas=config.blas)
        self._names, completions = ModelNames(config.settings.models), Completions()
        self._runner_service = PooledRunnerService(
            self.pool,
            config.settings,
            self._names,
            gate,
            environ,
            config.blas,
            Forwarder(),
            completions,
        )
        self._pool_service = PoolServicer(self.pool, config.settings, self._names, completions)
        interceptors: list[grpc.aio.ServerInterceptor] = []
        if config.token:
            interceptors.append(AuthInterceptor(config.token, config.use_token, translate))
        interceptors.append(ErrorInterceptor(_METHODS, translate))
        self._server = grpc.aio.server(interceptors=interceptors, options=CHANNEL_OPTIONS)
        self._ready: ReadyLine | None = None
        self._preparations: asyncio.Future[tuple[None, None]] | None = None
        self._metrics: PoolMetrics | None = None
        self._http: HttpServer | None = None
        self._http_host: PoolHost | None = None

    async def start(self, announce_ready: Callable[[ReadyLine], None] | None = None) -> ReadyLine:
        """Listen, answer calls, and begin to load pinned models.

        Args:
            announce_ready: Called with the address once calls are answered.

        Returns:
            The bound address.

        Raises:
            CannotListenError: The address cannot be listened on, or the TLS files cannot be used.
        """
        config = self._config
        self._runner_service.add_to(self._server)
        pool_pb2_grpc.add_PoolServiceServicer_to_server(self._pool_service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection(self._server, (*_SERVICES, health.SERVICE_NAME))
        add_controller(self._server, self.request_stop)
        self._ready = listen(
            self._server, config.listen, tls=config.tls, has_token=config.token is not None
        )
        for name in (*HEALTH_SERVICES, POOL_SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if config.metrics_listen:
            self._open_metrics(*config.metrics_listen)
        if config.http:
            await self._open_http(*config.http)
        await self.pool.__aenter__()
        await self._server.start()
        if announce_ready:
            announce_ready(self._ready)
        self._preparations = asyncio.gather(self._load_pinned(), self._estimate_configured())
        return self._ready

    def _open_metrics(self, host: str, port: int) -> None:
        try:
            from runner_client.pool.serving.metrics import PoolMetrics  # noqa: PLC0415 - may be missing

            metrics = PoolMetrics(self.pool.status)
            address = metrics.listen(host, port)
        except ImportError as error:
            raise CannotListenError(
                f"--metrics-listen needs {error.name}; {install_advice('metrics')}"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: not a valid host name
            raise CannotListenError(f"--metrics-listen {host}:{port}: {error}") from error
        self._metrics = self._runner_service.metrics = metrics
        logger.info("metrics on %s", address)
        if not is_loopback(host):
            logger.warning("%s serves metrics to other machines without authentication", address)

    async def _open_http(self, host: str, port: int) -> None:
        try:
            from runner_client.pool.serving.http_host import PoolHost, PoolKeeper  # noqa: PLC0415 - may be missing
            from runner_common.http.server import HttpServer  # noqa: PLC0415 - the same
        except ImportError as error:
            raise CannotListenError(
                f"--http needs {error.name}; {install_advice('http')}"
            ) from error
        config = self._config
        keeper = PoolKeeper(self._runner_service, self.pool, config.settings, self._names)
        self._http_host = PoolHost(self._runner_service, self._pool_service.state, keeper)
        self._http = HttpServer(self._http_host, config.tls, config.token, config.use_token)
        await self._http.start(host, port)

    async def run(self) -> None:
        """Serve until a stop is requested."""
        await self._stop.wait()
        await self.close()

    def request_stop(self) -> None:
        """Start an orderly shutdown."""
        self._stop.set()

    def exit_now(self, code: int) -> NoReturn:
        """End the process at once. Runners notice it, and end within 2 s."""
        exit_at_once(self._ready, code)

    async def close(self) -> None:
        """Refuse new work, stop and reap all runners, and close the server."""
        await self._health.enter_graceful_shutdown()
        if self._preparations is not None:
            self._preparations.cancel()
            await asyncio.gather(self._preparations, return_exceptions=True)
        if self._metrics is not None:
            self._metrics.close()
        if self._http_host is not None:
            self._http_host.is_stopping = True
        await self.pool.close()
        await asyncio.gather(
            self._server.stop(_STREAM_GRACE_SECONDS), *([self._http.stop()] if self._http else ())
        )

    async def _load_pinned(self) -> None:
        for name, settings in self._config.settings.models.items():
            if settings.pinned:
                try:
                    await self.pool.load(name)
                except RunnerError as error:
                    # Without a traceback: the reason suffices.
                    logger.error("the pinned model %s is not loaded: %s", name, error)  # noqa: TRY400 - says enough

    async def _estimate_configured(self) -> None:
        """Estimate the configured models, so that they are listed with their path and need."""
        for name, settings in self._config.settings.models.items():
            if not settings.pinned:
                try:
                    await self.pool.know(name)
                except RunnerError as error:
                    logger.warning("%s cannot be loaded: %s", name, error)


async def serve(config: PoolServerConfig) -> int:
    """Run a pool's server until a stop is requested; print the ready line.

    Returns:
        The exit code if the server cannot start. Otherwise the process exits here, in the end.
    """
    app = PoolApp(config)
    install_signals(app.request_stop, app.exit_now)
    if config.exit_with_parent:
        OrphanGuard(
            partial(asyncio.get_running_loop().call_soon_threadsafe, app.request_stop)
        ).start()
    try:
        await app.start(announce)
    except CannotListenError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message suffices
        await app.close()
        return EXIT_CANNOT_START
    await app.run()
    # Everything is closed. Python's own exit would wait for worker threads that still estimate.
    logging.shutdown()
    os._exit(0)
