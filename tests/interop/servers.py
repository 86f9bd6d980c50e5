"""The servers of the scenarios: real processes, each ended by pid."""

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
from runner_common.contract import TOKEN_VARIABLE
from runner_common.handshake import ReadyLine
from support.faulty import NAMED_REQUESTS, hooked
from support.scripted_model import build_scripted_model

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "runner_server/demo/model"

_START_SECONDS = 120.0
_STOP_SECONDS = 20.0

# Clients poll the status every 20 ms, and the demo model loads in little more than that.
_SLOW_LOAD = """
import time
from runner_server.engine.request_registry import RequestRegistry
note_progress = RequestRegistry.note_progress

def slow(self, progress):
    note_progress(self, progress)
    time.sleep(0.02)

RequestRegistry.note_progress = slow
"""

# The request id selects the speed of the steps. A slow request has 1,022 steps and, unless it is
# cancelled, lasts longer than clients wait for its end.
_SLOW_STEPS = (
    NAMED_REQUESTS
    + """
import time
from runner_server.engine.thread import EngineThread
run = EngineThread._run
silenced = set()

def slow(self, item, executor):
    for completion in self._scheduler.running:
        if completion.name == "slow":
            time.sleep(0.05)
        if completion.name == "silent" and completion.id not in silenced:
            silenced.add(completion.id)
            time.sleep(60)
    return run(self, item, executor)

EngineThread._run = slow
"""
)


@dataclass(frozen=True)
class Server:
    """A server, as described to a client.

    Attributes:
        address: The address of the server.
        token: The token that callers need; None if they need none.
        relay: The relay that clients connect to instead, which counts pings; None without.
    """

    address: str
    token: str | None = None
    relay: Relay | None = None

    def entry(self) -> dict[str, str]:
        """Return the server's entry in SERVERS."""
        entry = {"address": self.relay.address if self.relay else self.address}
        return entry | ({"token": self.token} if self.token else {})


class _Child:
    """A server process, with a log file in ``folder``.

    Args:
        folder: The folder for files of all servers.
        name: The name of this server, for files.
        options: More command-line options.
        listen: The address to listen on.
        hook: Code to run before anything else.
        token: The token that callers must send.
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
        """Wait until the server answers, and has loaded the model of the command line if any.

        Raises:
            AssertionError: The server did not start, or did not load in time.
        """
        assert self._process.stdout
        line = self._process.stdout.readline().decode()
        assert line, f"the server did not start:\n{self._log.read_text()}"
        address = ReadyLine.parse(line).target
        wanted = State.ACTIVE if self._is_loading else State.IDLE
        with RunnerClient(address, token=self._token) as client:
            end = time.monotonic() + _START_SECONDS
            while client.status().state is not wanted:
                assert time.monotonic() < end, f"the server did not load:\n{self._log.read_text()}"
                time.sleep(0.05)
        return Server(address, token=self._token)

    def close(self) -> None:
        """Stop the server, with SIGKILL after a grace time."""
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
    """Start the servers for concurrent clients, which have no effect on each other there."""
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
            "scripted": start("scripted", "--model", str(build_scripted_model(folder / "model"))),
        }
        yield {name: child.ready() for name, child in children.items()}


@contextmanager
def own_servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Start the servers of a single client, for loads and a full queue."""
    load = ("--model", str(DEMO_MODEL), "--parallel", "1", "--max-queued", "1")
    with (
        closing(_Child(folder, "empty", hook=_SLOW_LOAD)) as empty,
        closing(_Child(folder, "slow", *load, hook=_SLOW_STEPS)) as slow,
    ):
        address = slow.ready().address
        with closing(Relay(int(address.rpartition(":")[2]))) as relay:
            yield {"empty": empty.ready(), "slow": Server(address, relay=relay)}
