"""What all contenders have in common: a process, and a way to ask it for tokens."""

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

PARALLEL = 32
"""Streams at once, at most; the peers' own default."""

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_RETRY_SECONDS = 0.005
_QUIET_INTERVAL_SECONDS = 0.05
_QUIET_SHARE = 0.3
_QUIET_SECONDS = 20.0

Probe = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Setup:
    """What a contender is started with.

    Attributes:
        model: The model's directory.
        context_length: The longest sequence it must take, in tokens.
        blas: ``"auto"`` puts the fastest BLAS found in front; ``"off"`` leaves the
            one MLX was installed with.
    """

    model: Path
    context_length: int
    blas: str = "auto"


class Contender(ABC):
    """One program that generates tokens, in a process of its own.

    Args:
        setup: What it is started with.
    """

    name: ClassVar[str]

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._process: asyncio.subprocess.Process | None = None

    @abstractmethod
    async def start(self) -> None:
        """Starts the process; returns when it answers requests, or is about to.

        Raises:
            ContenderError: It cannot be started.
        """

    @abstractmethod
    async def run(self, requests: Sequence[Request]) -> list[Record]:
        """Does all requests, each at its time.

        Raises:
            ContenderError: It failed, or did not do what it was asked.
        """

    def probes(self) -> dict[str, Probe]:
        """The calls that tell whether it is well, by name; none if it has none."""
        return {}

    async def stop(self) -> None:
        """Ends the process and waits until it is gone."""
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

    def pause(self) -> None:
        """Stops its clock: what polls when idle would disturb the others."""
        self._alive().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        self._alive().send_signal(signal.SIGCONT)

    async def quiet(self) -> None:
        """Waits until it is idle: cancelled work may take a while to end."""
        process = psutil.Process(self._alive().pid)
        deadline = asyncio.get_running_loop().time() + _QUIET_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            before = process.cpu_times()
            await asyncio.sleep(_QUIET_INTERVAL_SECONDS)
            after = process.cpu_times()
            used = after.user + after.system - before.user - before.system
            if used < _QUIET_SHARE * _QUIET_INTERVAL_SECONDS:
                return

    def rss_bytes(self) -> int:
        """The resident set of the process."""
        return int(psutil.Process(self._alive().pid).memory_info().rss)

    async def _spawn(
        self, command: Sequence[str], environment: dict[str, str], *, pipes: bool = False
    ) -> asyncio.subprocess.Process:
        """Starts the process in a group of its own: Ctrl-C is for the benchmark, which ends it.

        It runs in the cache's folder, so that it imports what is installed.
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
        """Tries until it works, the process dies, or too much time has passed."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while not await attempt():
            self._alive()
            if asyncio.get_running_loop().time() > deadline:
                raise ContenderError(f"no {what} within {_START_SECONDS:.0f} s")
            await asyncio.sleep(_RETRY_SECONDS)

    async def _line(self) -> bytes:
        """The next line of its stdout."""
        process = self._alive()
        if process.stdout is None:
            raise ContenderError("its stdout is no pipe")
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            self._alive()
        return line


class Server(Contender):
    """A contender that is asked over the network.

    Args:
        setup: What it is started with.
    """

    port: int

    @abstractmethod
    async def stream(self, request: Request, record: Record) -> None:
        """Does one request; see ``load.Stream``."""

    async def run(self, requests: Sequence[Request]) -> list[Record]:
        """Does all requests over connections of the load generator; see ``Contender.run``."""
        self._alive()
        return await drive(self.stream, requests)

    async def _listening(self) -> None:
        """Waits until something listens on the port."""

        async def attempt() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            return True

        await self._until(attempt, f"open port {self.port}")


def free_port() -> int:
    """A port nothing listens on, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
