"""Servers and pools in processes of their own, with an HTTP port and the demo model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from runner_client.host.environment import child_environment
from runner_common.handshake import ReadyLine
from support.embedding_models import say_that_it_embeds

DEMO = Path(__file__).parents[2] / "runner_server" / "demo" / "model"

_DEADLINE_SECONDS = 60.0


@dataclass
class HttpChild:
    """A server or a pool.

    Attributes:
        process: The process.
        url: URL of the HTTP port.
        address: Address of gRPC.
        log: Its log.
    """

    process: subprocess.Popen[bytes]
    url: str
    address: str
    log: Path

    def wait_until_ready(self) -> None:
        """Wait until requests are accepted."""
        end = time.monotonic() + _DEADLINE_SECONDS
        while not self._is_ready():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        status, _ = self.call("GET", "/health")
        return status == HTTPStatus.OK

    def call(
        self, verb: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON object of a response."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = HTTPConnection(host, int(port), timeout=_DEADLINE_SECONDS)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(verb, path, body, named)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()


def embedding_demo(directory: Path) -> Path:
    """Return a copy of the demo model whose files say that it embeds, too."""
    shutil.copytree(DEMO, directory)
    return say_that_it_embeds(directory)


@contextmanager
def http_server(directory: Path, model: Path, *options: str, **env: str) -> Iterator[HttpChild]:
    """Run a server with a model."""
    command = [sys.executable, "-m", "runner_server", "--model", str(model)]
    with http_child(directory, [*command, *options], env) as child:
        child.wait_until_ready()
        yield child


@contextmanager
def http_pool(directory: Path, model: Path, *options: str, **env: str) -> Iterator[HttpChild]:
    """Run a pool with one model."""
    config = directory / "models.toml"
    config.write_text(f'budget = "8GiB"\n[models."{model}"]\npinned = true\n')
    program = str(Path(sysconfig.get_path("scripts")) / "mlx-runner")
    with http_child(directory, [program, "pool", "--config", str(config), *options], env) as child:
        yield child


@contextmanager
def http_child(
    directory: Path, command: Sequence[str], env: dict[str, str] | None = None
) -> Iterator[HttpChild]:
    """Run a command with an HTTP port."""
    log = directory / f"{len(list(directory.iterdir()))}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--http", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            env=child_environment(os.environ | (env or {}), backend="cpu"),
        )
    assert process.stdout
    try:
        line = process.stdout.readline().decode()
        assert line, log.read_text()
        # The port is open before the ready line is printed.
        found = re.search(r"http on (\S+)", log.read_text())
        assert found, log.read_text()
        yield HttpChild(process, found[1], ReadyLine.parse(line).target, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
