"""Fixtures: a pool and a server in processes of their own, with Ollama's interface.

They end with each module, because other tests count the reservations of memory.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.host.environment import child_environment
from runner_common.handshake import ReadyLine
from support.gateway import DEMO
from support.scripted_model import build_scripted_model

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

_DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """A server of Ollama's interface.

    Attributes:
        url: The URL.
        log: The log of the process.
        models: Names of the models, by the names in scenarios.
        is_pool: Whether it is a pool.
    """

    url: str
    log: Path
    models: dict[str, str]
    is_pool: bool

    @contextmanager
    def runner(self) -> Iterator[Callable[[], pb.StatusResponse]]:
        """Connect to the gRPC port; yield a function for the status of the demo model."""
        target = ReadyLine.parse((self.log.parent / "ready").read_text()).target
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(target, options=options) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            yield lambda: stub.Status(pb.StatusRequest(model=self.models["DEMO"]))


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model that answers by a script, and embeds."""
    return build_scripted_model(tmp_path_factory.mktemp("ollama") / "scripted")


@pytest.fixture(scope="module")
def pool(scripted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a pool with the scripted model and the demo model."""
    folder = tmp_path_factory.mktemp("ollama-pool")
    config = folder / "models.toml"
    config.write_text(
        "[default]\nparallel = 2\ncontext_length = 1024\nprefix_cache = 0\n"
        f'[models."{scripted}"]\n[models."{DEMO}"]\n'
    )
    models = {"SCRIPTED": str(scripted), "DEMO": str(DEMO)}
    arguments = ["runner_common.console", "pool", "--config", str(config)]
    with serving(folder, *arguments) as (url, log):
        yield Served(url, log, models, is_pool=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a server with the demo model."""
    folder = tmp_path_factory.mktemp("ollama-server")
    arguments = ["runner_common.console", "serve", "--model", str(DEMO), "--parallel", "2"]
    with serving(folder, *arguments) as (url, log):
        yield Served(url, log, {"DEMO": str(DEMO)}, is_pool=False)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[str, Path]]:
    """Run a process with an HTTP port; yield its URL and its log."""
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--http", "127.0.0.1:0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment(os.environ, backend="cpu"),
        )
    assert process.stdin
    assert process.stdout
    try:
        line = process.stdout.readline().decode()
        assert line, log.read_text()
        (folder / "ready").write_text(line)
        yield _url(log), log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_DEADLINE_SECONDS)
        process.stdin.close()
        process.stdout.close()


def _url(log: Path) -> str:
    end = time.monotonic() + _DEADLINE_SECONDS
    while not ((found := re.search(r"http on (\S+)", log.read_text())) and _is_ready(found[1])):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found[1]


def _is_ready(url: str) -> bool:
    return httpx.get(f"{url}/health").status_code == 200
