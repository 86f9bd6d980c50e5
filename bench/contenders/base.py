"""Base classes of the contenders, which are child processes."""

from __future__ import annotations

import asyncio
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from bench.load import drive
from bench.paths import CACHE
from bench.records import ContenderError, Record, Request

PARALLEL = 64
"""Maximum number of concurrent streams; the peers' default."""

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_RETRY_SECONDS = 0.005
_QUIET_INTERVAL_SECONDS = 0.05
_QUIET_SHARE = 0.3
_QUIET_SECONDS = 20.0

Probe = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Setup:
    """Settings a contender is started with.

    Attributes:
        model: Model directory.
        context_length: Longest sequence to support, in tokens.
        blas: ``"auto"`` selects the fastest BLAS found; ``"off"`` keeps the one installed with
            MLX.
        parallel: Most streams at a time.
    """

    model: Path
    context_length: int
    blas: str = "auto"
    parallel: int = PARALLEL


class Program(ABC):
    """A child process, measured in turn with others.

    Args:
        setup: Settings the program is started with.
    """

    name: ClassVar[str]

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._process: asyncio.subprocess.Process | None = None

    @abstractmethod
    async def start(self) -> None:
        """Start the process and wait for the end of the start.

        Raises:
            ContenderError: The process cannot be started.
        """

    async def stop(self) -> None:
        """Stop the process and wait for the exit."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def pid(self) -> int:
        """Id of the running process."""
        return self._alive().pid

    def pause(self) -> None:
        """Suspend the process, which might otherwise poll while idle and disturb the others."""
        self._alive().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the suspended process."""
        self._alive().send_signal(signal.SIGCONT)

    async def quiet(self) -> None:
        """Wait until the process is idle, since cancelled work may take a while to end."""
        process = psutil.Process(self.pid)
        deadline = asyncio.get_running_loop().time() + _QUIET_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            before = process.cpu_times()
            await asyncio.sleep(_QUIET_INTERVAL_SECONDS)
            after = process.cpu_times()
            used = after.user + after.system - before.user - before.system
            if used < _QUIET_SHARE * _QUIET_INTERVAL_SECONDS:
                return

    def rss_bytes(self) -> int:
        """Return the resident set of the process."""
        return int(psutil.Process(self.pid).memory_info().rss)

    async def _spawn(
        self, command: Sequence[str], environment: dict[str, str], *, pipes: bool = False
    ) -> asyncio.subprocess.Process:
        """Start the process in a new session, so that Ctrl-C reaches only the benchmark.

        The working directory is the cache, so that the process imports installed packages rather
        than this checkout.
        """
        log = CACHE / "logs" / f"{self.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                cwd=CACHE,
                stdin=asyncio.subprocess.PIPE if pipes else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if pipes else output,
                stderr=output,
                start_new_session=True,
                limit=2**26,
            )
        return self._process

    def _alive(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise ContenderError("not started")
        if self._process.returncode is not None:
            log = f"bench/.cache/logs/{self.name}.log"
            raise ContenderError(f"exited with code {self._process.returncode}; see {log}")
        return self._process

    async def _until(self, attempt: Callable[[], Awaitable[bool]], what: str) -> None:
        """Retry ``attempt`` until success; raise if the process exits or the start times out."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while not await attempt():
            self._alive()
            if asyncio.get_running_loop().time() > deadline:
                raise ContenderError(f"no {what} within {_START_SECONDS:.0f} s")
            await asyncio.sleep(_RETRY_SECONDS)

    async def _line(self) -> bytes:
        """Read the next line of the process's stdout."""
        process = self._alive()
        if process.stdout is None:
            raise ContenderError("stdout is not a pipe")
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            self._alive()
        return line


async def start_paused(programs: Sequence[Program]) -> None:
    """Start programs that are to take turns, one after another, and suspend each."""
    for program in programs:
        await program.start()
        await program.quiet()
        program.pause()


class Contender(Program):
    """A program that generates tokens."""

    @abstractmethod
    async def run(self, requests: Sequence[Request]) -> list[Record]:
        """Run the requests, each at its scheduled time.

        Raises:
            ContenderError: The contender failed or did not do the requested work.
        """

    def probes(self) -> dict[str, Probe]:
        """Return the health calls of the contender by name; empty by default."""
        return {}


class Server(Contender):
    """A contender that serves requests over the network.

    Args:
        setup: Settings the program is started with.
    """

    port: int

    @abstractmethod
    async def stream(self, request: Request, record: Record) -> None:
        """Run one request; see ``load.Stream``."""

    async def run(self, requests: Sequence[Request]) -> list[Record]:
        """Run the requests with the load generator; see ``Contender.run``."""
        self._alive()
        return await drive(self.stream, requests)

    async def _listening(self) -> None:
        """Wait until the port accepts connections."""

        async def attempt() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            return True

        await self._until(attempt, f"open port {self.port}")


def free_port() -> int:
    """Return an unused port, for servers that cannot choose a port themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
