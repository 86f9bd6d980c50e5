"""The servers that scenarios ask for: real processes, each ended by its id."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop.pings import Relay
from runner_client import RunnerClient, State
from runner_common.handshake import TOKEN_VARIABLE, ReadyLine
from support.faulty import NAMED_REQUESTS, hooked

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "runner_server/demo/model"

_START_SECONDS = 120.0
_STOP_SECONDS = 20.0

# A load is watched every 20 ms, and the demo model's takes hardly longer than that.
_SLOW_LOAD = """
import time
from runner_server.engine.request_registry import RequestRegistry
note_progress = RequestRegistry.note_progress

def slow(self, progress):
    note_progress(self, progress)
    time.sleep(0.02)

RequestRegistry.note_progress = slow
"""

# Requests say by their id how their steps are to be. A slow one goes on for longer than clients
# wait for its end, unless it is cancelled: it has 1,022 steps.
_SLOW_STEPS = (
    NAMED_REQUESTS
    + """
import time
from runner_server.engine.thread import EngineThread
step = EngineThread._step
silenced = set()

def slow(self, batch):
    for completion in self._scheduler.running:
        if completion.name == "slow":
            time.sleep(0.05)
        if completion.name == "silent" and completion.id not in silenced:
            silenced.add(completion.id)
            time.sleep(60)
    return step(self, batch)

EngineThread._step = slow
"""
)


@dataclass(frozen=True)
class Server:
    """A server as a client is told of it.

    Attributes:
        address: Where it listens.
        token: What it asks its callers for; None asks for nothing.
        relay: What clients connect to instead, and which counts their pings.
    """

    address: str
    token: str | None = None
    relay: Relay | None = None

    def entry(self) -> dict[str, str]:
        """Its object in a client's SERVERS."""
        entry = {"address": self.relay.address if self.relay else self.address}
        return entry | ({"token": self.token} if self.token else {})


class _Child:
    """A server process; its log is a file that ``folder`` gets.

    Args:
        folder: For files of all servers.
        name: Of this one.
        options: Of its command line.
        listen: Where it listens.
        hook: Code that it runs before anything else.
        token: What callers must send.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *options: str,
        listen: str = "127.0.0.1:0",
        hook: str = "",
        token: str | None = None,
    ) -> None:
        self._log = folder / f"{name}.log"
        self._token = token
        command = [sys.executable, "-m", "runner_server", "--exit-with-parent", "--listen", listen]
        environment = dict(os.environ)
        environment.pop(TOKEN_VARIABLE, None)
        if token:
            environment[TOKEN_VARIABLE] = token
        if hook:
            (folder / name).mkdir()
            environment |= hooked(folder / name, hook)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
            )
        self._is_loading = "--model" in options

    def ready(self) -> Server:
        """Waits until it answers, and has loaded what it was told to load.

        Raises:
            AssertionError: It does not.
        """
        assert self._process.stdout
        line = self._process.stdout.readline().decode()
        assert line, f"the server did not start:\n{self._log.read_text()}"
        address = ReadyLine.parse(line).target
        wanted = State.ACTIVE if self._is_loading else State.IDLE
        with RunnerClient(address, token=self._token) as client:
            end = time.monotonic() + _START_SECONDS
            while client.status().state is not wanted:
                assert time.monotonic() < end, f"it does not load:\n{self._log.read_text()}"
                time.sleep(0.05)
        return Server(address, token=self._token)

    def close(self) -> None:
        """Asks it to stop, and kills it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


@contextmanager
def shared_servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Those that clients may use at the same time: nothing they do there is seen by others."""
    load = ("--model", str(DEMO_MODEL))
    with ExitStack() as stack:

        def start(name: str, *options: str, **more: str) -> _Child:
            child = _Child(folder, name, *options, **more)
            stack.callback(child.close)
            return child

        children = {
            "plain": start("plain", *load),
            "unix": start("unix", *load, listen=f"unix:{folder / 'socket'}"),
            "token": start("token", token=secrets.token_urlsafe()),
        }
        yield {name: child.ready() for name, child in children.items()}


@contextmanager
def own_servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Those that each client has for itself: it loads there, or fills the queue."""
    load = ("--model", str(DEMO_MODEL), "--parallel", "1", "--max-queued", "1")
    with (
        closing(_Child(folder, "empty", hook=_SLOW_LOAD)) as empty,
        closing(_Child(folder, "slow", *load, hook=_SLOW_STEPS)) as slow,
    ):
        address = slow.ready().address
        with closing(Relay(int(address.rpartition(":")[2]))) as relay:
            yield {"empty": empty.ready(), "slow": Server(address, relay=relay)}
