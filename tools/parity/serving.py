"""Server for the comparison."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from runner_client import RunnerClient

_COMMAND = (sys.executable, "-m", "runner_server", "--listen", "127.0.0.1:0", "--exit-with-parent")


@contextmanager
def server() -> Iterator[RunnerClient]:
    """Start a server without a model and yield a client connected to it."""
    child = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        ready = cast("IO[str]", child.stdout).readline()
        with RunnerClient(ready.strip().split("|")[3]) as client:
            yield client
    finally:
        child.terminate()
        child.wait(30)
