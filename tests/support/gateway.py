"""The SMG gateway as a child process, in front of runners in child processes."""

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
    """A gateway and the runners it serves.

    Attributes:
        port: Port that the gateway listens on.
        runners: The runners, in the order given to the gateway.
        log: Output of the gateway.
    """

    port: int
    runners: Sequence[Child]
    log: Path

    def workers(self) -> list[dict[str, Any]]:
        """Return the gateway's view of the workers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/workers", timeout=5) as answer:
            workers: list[dict[str, Any]] = json.load(answer)["workers"]
        return workers


@contextmanager
def fleet(
    directory: Path,
    count: int,
    *,
    alone: Sequence[str] = (),
    contract: str = "--smg",
    model: Path = DEMO,
    options: Sequence[str] = (),
) -> Iterator[Fleet]:
    """Run a gateway in front of runners.

    Args:
        directory: Directory for the logs.
        count: Number of runners.
        alone: Prefix of the gateway's command, see :func:`without`.
        contract: The runners' option for the contract to serve.
        model: Directory of the model.
        options: More options of the gateway, in place of the policy round_robin.
    """
    with ExitStack() as stack:
        runners = [
            stack.enter_context(running(directory, contract, "--model", str(model)))
            for _ in range(count)
        ]
        # The gateway retries a runner without a model only after half a minute.
        for child in runners:
            child.wait_for(partial(_is_loaded, child))
        port, metrics_port = _free_port(), _free_port()
        log = directory / "gateway.log"
        command = [sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--prometheus-host", "127.0.0.1"]
        command += ["--prometheus-port", str(metrics_port)]
        command += options or ["--policy", "round_robin"]
        command += ["--worker-urls", *(f"grpc://{child.ready.address}" for child in runners)]
        process = stack.enter_context(_process([*alone, *command], log))
        found = Fleet(port, runners, log)
        wait_for(lambda: _is_complete(found), process, log)
        yield found


def hiding(path: Path) -> list[str]:
    """Return a command prefix (Linux only) which hides the contents of a directory."""
    hide = f'mount -t tmpfs none {shlex.quote(str(path))} && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", hide, "sh"]


def wait_for(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes] | None = None,
    log: Path = Path(),
) -> None:
    """Wait for a condition by polling, as long as ``process`` lives."""
    end = time.monotonic() + _DEADLINE_SECONDS
    while not condition():
        if process:
            assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, (
            log.read_text() if process else "the condition was not met in time"
        )
        time.sleep(0.02)


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # A proxy would send the gateway's calls to another machine.
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
    """Return whether the gateway knows every runner and can tokenize for the model."""
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
    """Return an unused port, since the gateway cannot choose one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
