"""Fixtures: a pool and a server in processes of their own, with Ollama's interface.

They end with each module, because other tests count the reservations of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.http_child import DEMO, HttpChild, http_child, http_server
from support.scripted_model import build_scripted_model

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

POOL = (sys.executable, "-m", "runner_common.console", "pool")
"""Command of a pool."""


@dataclass(frozen=True)
class Served:
    """A server of Ollama's interface.

    Attributes:
        child: The process.
        models: Names of the models, by the names in scenarios.
    """

    child: HttpChild
    models: dict[str, str]

    @property
    def url(self) -> str:
        """URL of the HTTP port."""
        return self.child.url

    @contextmanager
    def runner(self) -> Iterator[Callable[[], pb.StatusResponse]]:
        """Connect to the gRPC port; yield a function for the status of the demo model."""
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(self.child.address, options=options) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            yield lambda: stub.Status(pb.StatusRequest(model=self.models["DEMO"]))


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with scripted answers and with vectors."""
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
    with http_child(folder, [*POOL, "--config", str(config)]) as child:
        yield Served(child, {"SCRIPTED": str(scripted), "DEMO": str(DEMO)})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a server with the demo model."""
    folder = tmp_path_factory.mktemp("ollama-server")
    with http_server(folder, DEMO, "--parallel", "2") as child:
        yield Served(child, {"DEMO": str(DEMO)})


@pytest.fixture(params=["pool", "server"])
def served(request: pytest.FixtureRequest) -> Served:
    """Each of both."""
    found: Served = request.getfixturevalue(request.param)
    return found
