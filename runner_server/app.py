"""Assembly of the server: engine, services, listening address, signals and shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mlxrunner.v1 import runner_pb2_grpc
from runner_common.contract import HEALTH_SERVICES, SERVICE_NAME
from runner_common.extras import install_advice
from runner_common.handshake import ReadyLine
from runner_common.serving.auth import AuthInterceptor, is_loopback
from runner_common.serving.go_plugin import add_controller
from runner_common.serving.interceptor import ErrorInterceptor
from runner_common.serving.lifetime import announce, exit_at_once, install_signals
from runner_common.serving.listen import CHANNEL_OPTIONS, CannotListenError, listen
from runner_common.serving.orphan_guard import OrphanGuard
from runner_common.serving.reflection import add_reflection
from runner_server import __version__
from runner_server.api.estimator import Estimator
from runner_server.api.service import RunnerServicer
from runner_server.chat.renderer import ChatRenderer
from runner_server.config import ServerConfig
from runner_server.engine.backend import Backend, Ranks
from runner_server.engine.engine import Engine
from runner_server.engine.health.memory_pressure import PressureWatch
from runner_server.engine.health.stall_watchdog import EXIT_STALLED, StallWatchdog
from runner_server.engine.types import LoadSpec
from runner_server.errors import RunnerFault
from runner_server.host.machine_admission import MachineAdmission
from runner_server.host.model_root import ModelRoot
from runner_server.telemetry.interceptor import Observer, TelemetryInterceptor
from runner_server.telemetry.methods import METHODS, SMG_SERVICE_NAME, VLLM_SERVICE_NAME
from runner_server.telemetry.request_log import RequestLog
from runner_server.telemetry.tracing import Tracing, open_tracing
from runner_server.transport.translate import translate

if TYPE_CHECKING:
    from runner_common.http.server import HttpServer
    from runner_server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 70
"""Exit code after an unrecoverable engine failure; BSD's EX_SOFTWARE."""

EXIT_CANNOT_START = 1
"""Exit code when the address cannot be bound or the model of the command line cannot be loaded."""

_DRAIN_SECONDS = 5.0
_STREAM_GRACE_SECONDS = 0.5


class RunnerApp:
    """A server with its engine, from start to shutdown.

    Create instances on the running event loop.

    Args:
        config: Options of the server.
        backend: The model library.
        ranks: Other processes with parts of the model; None if this process has all of it.
        admission: Decides whether there is memory for a load. Default: the machine's.
    """

    def __init__(
        self,
        config: ServerConfig,
        backend: Backend,
        ranks: Ranks | None = None,
        admission: MachineAdmission | None = None,
    ) -> None:
        self._config = config
        self._admission = admission or MachineAdmission()
        self._ranks = ranks
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._health = health.aio.HealthServicer()
        self.engine = Engine(
            backend,
            max_queued=config.max_queued,
            on_death=self._on_death,
            max_draft=config.draft_tokens,
        )
        root = ModelRoot(config.model_root) if config.model_root else None
        self._estimator = Estimator(self._admission, root)
        self._renderer = ChatRenderer()
        self._observers: list[Observer] = [RequestLog()]
        self._metrics: Metrics | None = None
        self._tracing: Tracing | None = None
        interceptors: list[grpc.aio.ServerInterceptor] = [TelemetryInterceptor(self._observers)]
        if config.token:
            interceptors.append(AuthInterceptor(config.token, config.use_token, translate))
        interceptors.append(ErrorInterceptor(METHODS, translate))
        self._server = grpc.aio.server(interceptors=interceptors, options=CHANNEL_OPTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: HttpServer | None = None
        self._ready: ReadyLine | None = None
        self._others: tuple[str, ...] = ()

    async def start(self, announce: Callable[[ReadyLine], None] | None = None) -> ReadyLine:
        """Listen, answer calls and start importing the model library.

        Args:
            announce: Called with the address once calls are answered, before the import takes the
                CPU.

        Returns:
            The bound address.

        Raises:
            CannotListenError: The address is invalid, in use, or open to other machines without
                authentication; or the TLS files cannot be used.
        """
        servicer = self._add_services()
        config = self._config
        ready = listen(
            self._server, config.listen, tls=config.tls, has_token=config.token is not None
        )
        self._ready = ready
        for name in (*HEALTH_SERVICES, *self._others):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if config.metrics_listen:
            self._open_metrics(*config.metrics_listen)
        self._open_tracing()
        if config.http:
            await self._open_http(servicer, *config.http)
        await self._server.start()
        if announce:
            announce(ready)
        self.engine.start()
        self._watch_ranks()
        if self._config.load:
            self._spawn(self._load_first(self._config.load))
        self._spawn(PressureWatch(self.engine, self._admission).run())
        if self._config.stall_seconds:
            self._spawn(
                StallWatchdog(self.engine, self._config.stall_seconds, self._on_stall).run()
            )
        return ready

    async def run(self) -> int:
        """Serve until a stop is requested or the engine dies; return the exit code."""
        await self._stop.wait()
        await self.close()
        return self._exit_code

    def request_stop(self) -> None:
        """Start an orderly shutdown."""
        self._stop.set()

    def exit_now(self, code: int) -> NoReturn:
        """End the process at once; clean up nothing but the file of a unix socket."""
        exit_at_once(self._ready, code)

    async def close(self) -> None:
        """Refuse new work, end streams, free the model and close the server."""
        await self._health.enter_graceful_shutdown()
        self.engine.stop()
        self._estimator.close()
        self._renderer.close()
        if self._metrics:
            self._metrics.close()
        if not await self.engine.wait_ended(_DRAIN_SECONDS):
            logger.error("the engine did not end within %.0f s; exiting anyway", _DRAIN_SECONDS)
        await asyncio.gather(
            self._server.stop(_STREAM_GRACE_SECONDS), *([self._http.stop()] if self._http else ())
        )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tracing:
            self._tracing.close()

    def _open_metrics(self, host: str, port: int) -> None:
        try:
            from runner_server.telemetry.metrics import Metrics  # noqa: PLC0415 - may be missing

            self._metrics = Metrics(self.engine, __version__)
            address = self._metrics.listen(host, port)
        except ImportError as error:
            raise CannotListenError(
                f"--metrics-listen needs {error.name}; {install_advice('metrics')}"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: not a valid host name
            raise CannotListenError(f"--metrics-listen {host}:{port}: {error}") from error
        self._observers.append(self._metrics)
        logger.info("metrics on %s", address)
        if not is_loopback(host):
            logger.warning("%s serves metrics to other machines without authentication", address)

    def _open_tracing(self) -> None:
        # Before the first call, so that it gets a span too.
        self._tracing = open_tracing(__version__)
        if self._tracing:
            self._observers.append(self._tracing)

    async def _open_http(self, servicer: RunnerServicer, host: str, port: int) -> None:
        try:
            from runner_common.http.server import HttpServer  # noqa: PLC0415 - may be missing
            from runner_server.api.contracts.http_host import RunnerHost  # noqa: PLC0415 - the same
        except ImportError as error:
            raise CannotListenError(
                f"--http needs {error.name}; {install_advice('http')}"
            ) from error
        config = self._config
        made = RunnerHost(servicer, self.engine, self._observers)
        self._http = HttpServer(made, config.tls, config.token, config.use_token)
        await self._http.start(host, port)

    def _add_services(self) -> RunnerServicer:
        servicer = RunnerServicer(
            self.engine, __version__, self._estimator, self._renderer, self._ranks
        )
        runner_pb2_grpc.add_RunnerServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.smg:
            self._add_smg()
        if self._config.vllm:
            self._add_vllm()
        add_reflection(self._server, (SERVICE_NAME, *self._others, health.SERVICE_NAME))
        add_controller(self._server, self.request_stop)
        return servicer

    def _add_smg(self) -> None:
        try:
            from runner_server.api.contracts.smg.service import add_smg  # noqa: PLC0415 - may be missing
        except ImportError as error:
            raise CannotListenError(f"--smg needs {error.name}; {install_advice('smg')}") from error
        add_smg(self._server, self.engine)
        self._others += (SMG_SERVICE_NAME,)

    def _add_vllm(self) -> None:
        try:
            from runner_server.api.contracts.vllm.service import add_vllm  # noqa: PLC0415 - may be missing
        except ImportError as error:
            text = f"--vllm needs {error.name}; {install_advice('smg')}"
            raise CannotListenError(text) from error
        add_vllm(self._server, self.engine, __version__)
        self._others += (VLLM_SERVICE_NAME,)

    def _watch_ranks(self) -> None:
        if self._ranks:
            call = asyncio.get_running_loop().call_soon_threadsafe
            self._ranks.watch(
                lambda why: call(self.engine.lose, why), lambda: call(self.request_stop)
            )

    def _on_death(self) -> None:
        self._exit_code = EXIT_ENGINE_DEAD
        self._spawn(self._health.enter_graceful_shutdown())
        self._stop.set()

    def _on_stall(self, text: str) -> None:
        self.engine.lose(text)
        self._exit_code = EXIT_STALLED

    async def _load_first(self, spec: LoadSpec) -> None:
        """Load the model of the command line; stop the process on failure."""
        try:
            await asyncio.wrap_future(self.engine.load(spec).future)
        except RunnerFault:
            if not self._stop.is_set():
                # The engine has logged the reason.
                logger.error("cannot load %s: exiting", spec.model)  # noqa: TRY400 - no traceback
                self._exit_code = EXIT_CANNOT_START
                self._stop.set()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("%s failed; the server goes on without it", task, exc_info=error)


async def serve(
    config: ServerConfig,
    backend: Backend,
    ranks: Ranks | None = None,
    admission: MachineAdmission | None = None,
) -> int:
    """Run a server until a stop is requested; print the ready line.

    Args:
        config: Options of the server.
        backend: The model library.
        ranks: Other processes with parts of the model; None if this process has all of it.
        admission: Decides whether there is memory for a load. Default: the machine's.

    Returns:
        The exit code if the server cannot start. Otherwise the process exits here, in the end.
    """
    app = RunnerApp(config, backend, ranks, admission)
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
    code = await app.run()
    # Everything is closed. Python's own exit would wait for worker threads that still tokenize, and
    # abort the process if the engine's thread hangs inside MLX.
    logging.shutdown()
    os._exit(code)
