"""The runner under load: starting, dialling and stopping a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.host.environment import child_environment
from runner_common.handshake import ReadyLine
from runner_common.host_memory.free import Backend
from soak.paths import MODEL
from soak.records import SoakError

PARALLEL = 8
MAX_QUEUED = 32
PREFIX_CACHE_BYTES = 16 * 2**20
"""Small enough to fill up, and start evicting, during the warm-up."""

_START_SECONDS = 120.0
_STOP_SECONDS = 15.0
_CALL_SECONDS = 30.0

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    # One connection per channel, not shared through a pool.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
)
_SMALL_READ_AHEAD = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10))
"""Limits of the client's read-ahead, which by default is several megabytes."""


class Runner:
    """One server process on a loopback port.

    Args:
        process: The server process.
        target: gRPC target of the server.
        log: File with the server's stderr.
    """

    def __init__(self, process: asyncio.subprocess.Process, target: str, log: Path) -> None:
        self._process = process
        self.target = target
        self.log = log
        self.os_process = psutil.Process(process.pid)

    def dial(self, *, limit_read_ahead: bool = False) -> grpc.aio.Channel:
        """Open a separate connection.

        Args:
            limit_read_ahead: Limit the read-ahead, so that the server soon notices a reader that
                stops.
        """
        options = (*_OPTIONS, *_SMALL_READ_AHEAD) if limit_read_ahead else _OPTIONS
        return grpc.aio.insecure_channel(self.target, options)

    @property
    def is_alive(self) -> bool:
        """True while the process is running."""
        return self._process.returncode is None

    async def stop(self) -> int | None:
        """Send SIGINT and return the exit code, or None if the process does not exit in time."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            return None


@asynccontextmanager
async def running(log: Path) -> AsyncIterator[Runner]:
    """Run a runner with the demo model loaded, killing the process on exit.

    Args:
        log: File that receives the runner's stderr.

    Raises:
        SoakError: The runner did not start.
    """
    command = [sys.executable, "-P", "-m", "runner_server", "--exit-with-parent"]
    command += ["--model", str(MODEL), "--parallel", str(PARALLEL)]
    command += ["--max-queued", str(MAX_QUEUED), "--log-level", "WARNING"]
    command += ["--prefix-cache-bytes", str(PREFIX_CACHE_BYTES)]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            # Ctrl-C goes to the soak only, which then stops the runner.
            process_group=0,
        )
    try:
        yield await _ready(process, log)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """Return the environment that the client gives a runner."""
    backend: Backend = "metal" if sys.platform == "darwin" else "cpu"
    return child_environment(os.environ, backend=backend)


async def _ready(process: asyncio.subprocess.Process, log: Path) -> Runner:
    """Wait for the ready line and until the model is loaded."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline() if process.stdout else b""
            if not line:
                raise SoakError(f"the runner did not start; log: {tail(log)}")
            runner = Runner(process, ReadyLine.parse(line.decode()).target, log)
            async with runner.dial() as channel:
                await _until_active(runner, channel)
    except TimeoutError as error:
        raise SoakError(f"the runner was not ready within {_START_SECONDS:.0f} s") from error
    return runner


async def _until_active(runner: Runner, channel: grpc.aio.Channel) -> None:
    stub = runner_pb2_grpc.RunnerServiceStub(channel)
    while runner.is_alive:
        status = await stub.Status(pb.StatusRequest(), timeout=_CALL_SECONDS)
        if status.state == pb.STATE_ACTIVE:
            return
        await asyncio.sleep(0.05)
    raise SoakError(f"the runner exited while loading the model; log: {tail(runner.log)}")


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Return whether the standard health service reports SERVING."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
