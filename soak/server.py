"""The runner under load: one real process, started and ended here, and how it is dialled."""

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
from soak.paths import MODEL, ROOT
from soak.records import SoakError

PARALLEL = 8
MAX_QUEUED = 32
PREFIX_CACHE_BYTES = 16 * 2**20
"""Small, so that it is full before the warm-up is over and evicts from then on."""

_START_SECONDS = 120.0
_STOP_SECONDS = 15.0
_CALL_SECONDS = 30.0

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A connection for each channel, and none from a pool.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
)
_LITTLE_AHEAD = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10))
"""A client that takes little before it reads it; by default it takes megabytes."""


class Runner:
    """One server process on a loopback port.

    Args:
        process: The process.
        target: Where it listens.
        log: What it writes to its standard error.
    """

    def __init__(self, process: asyncio.subprocess.Process, target: str, log: Path) -> None:
        self._process = process
        self.target = target
        self.log = log
        self.os_process = psutil.Process(process.pid)

    def dial(self, *, little_ahead: bool = False) -> grpc.aio.Channel:
        """A connection of its own.

        Args:
            little_ahead: Takes little before it is read, so that the server soon notices a
                reader that stops.
        """
        options = (*_OPTIONS, *_LITTLE_AHEAD) if little_ahead else _OPTIONS
        return grpc.aio.insecure_channel(self.target, options)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    async def stop(self) -> int | None:
        """Asks it to stop; returns its exit code, or None if it had to be killed."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            return None


@asynccontextmanager
async def running(log: Path) -> AsyncIterator[Runner]:
    """Starts a runner with the demo model loaded; it is gone afterwards.

    Args:
        log: Where its standard error goes.

    Raises:
        SoakError: It did not start.
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
            # Ctrl-C is for the soak, which then ends the runner.
            process_group=0,
        )
    try:
        yield await _ready(process, log)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """What a runner spawned by the client would get, and where this checkout lies."""
    backend: Backend = "metal" if sys.platform == "darwin" else "cpu"
    environment = child_environment(os.environ, backend=backend)
    places = [str(ROOT), str(ROOT / "proto"), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))}


async def _ready(process: asyncio.subprocess.Process, log: Path) -> Runner:
    """Waits for the ready line and for the model."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline() if process.stdout else b""
            if not line:
                raise SoakError(f"the runner did not start; its log: {tail(log)}")
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
    raise SoakError(f"the runner exited while it loaded its model; its log: {tail(runner.log)}")


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Asks the standard health service."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
