"""The SMG gateway as a process of its own, in front of runners that are processes too."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxrunner.v1 import runner_pb2 as pb
from support.server_child import Child, running

DEMO = Path(__file__).parents[2] / "runner_server" / "demo" / "model"

_DEADLINE_SECONDS = 60.0


@dataclass
class Fleet:
    """A gateway and the runners behind it.

    Attributes:
        port: Where the gateway answers.
        runners: In the order they were named to it.
        log: What the gateway wrote.
    """

    port: int
    runners: Sequence[Child]
    log: Path

    def workers(self) -> list[dict[str, Any]]:
        """The workers as the gateway sees them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/workers", timeout=5) as answer:
            workers: list[dict[str, Any]] = json.load(answer)["workers"]
        return workers


@contextmanager
def fleet(directory: Path, count: int, *, alone: Sequence[str] = ()) -> Iterator[Fleet]:
    """Runs a gateway in front of runners with the demo model.

    Args:
        directory: For their logs.
        count: How many runners.
        alone: A command that runs the gateway's, see :func:`without`.
    """
    with ExitStack() as stack:
        runners = [
            stack.enter_context(running(directory, "--smg", "--model", str(DEMO)))
            for _ in range(count)
        ]
        # A gateway that finds a runner without its model tries again only after half a minute.
        for child in runners:
            child.wait_for(partial(_is_loaded, child))
        port, metrics_port = _free_port(), _free_port()
        log = directory / "gateway.log"
        command = [sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--prometheus-host", "127.0.0.1"]
        command += ["--prometheus-port", str(metrics_port), "--policy", "round_robin"]
        command += ["--worker-urls", *(f"grpc://{child.ready.address}" for child in runners)]
        process = stack.enter_context(_process([*alone, *command], log))
        found = Fleet(port, runners, log)
        wait_for(lambda: _is_complete(found), process, log)
        yield found


def without(path: Path) -> list[str]:
    """A command for Linux that runs another which finds nothing in a directory."""
    hide = f'mount -t tmpfs none {shlex.quote(str(path))} && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", hide, "sh"]


def wait_for(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes] | None = None,
    log: Path = Path(),
) -> None:
    """Waits for a condition that nothing announces, as long as a process lives."""
    end = time.monotonic() + _DEADLINE_SECONDS
    while not condition():
        if process:
            assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text() if process else "it did not come"
        time.sleep(0.02)


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # What would send its calls elsewhere than to this machine.
    names = ("http_proxy", "https_proxy", "all_proxy")
    kept = {name: value for name, value in os.environ.items() if name.lower() not in names}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=kept
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _is_loaded(child: Child) -> bool:
    return child.status().state == pb.STATE_ACTIVE


def _is_complete(found: Fleet) -> bool:
    """Whether it knows all runners, and can split text for their model."""
    try:
        workers = found.workers()
        with urllib.request.urlopen(
            f"http://127.0.0.1:{found.port}/v1/tokenizers", timeout=5
        ) as answer:
            tokenizers = json.load(answer)["tokenizers"]
    except (urllib.error.URLError, OSError):
        return False
    healthy = [worker for worker in workers if worker["is_healthy"]]
    return len(healthy) == len(found.runners) and bool(tokenizers)


def _free_port() -> int:
    """A port nothing listens on: the gateway cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
