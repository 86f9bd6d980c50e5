"""External gRPC tools for tests/tools, and the servers to call with each."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from support.server_child import Child

ROOT = Path(__file__).parents[2]
BIN = ROOT / "tests" / "tools" / "bin"
NAMES = ("grpcurl", "ghz", "grpc_health_probe")
SERVICE = "mlxrunner.v1.RunnerService"
PROTOSET = "proto/mlxrunner/v1/runner.protoset"
TOKEN = "correct-horse-battery-staple"  # noqa: S105 - used in tests only

Done = subprocess.CompletedProcess[str]


class Run(Protocol):
    """Callable for running a program in the repository root, with the tools on PATH."""

    def __call__(self, name: str, *args: str, **env: str) -> Done:
        """Run a program; return both outputs and the exit code. ``env`` extends the environment."""
        ...


@dataclass(frozen=True)
class ToolTarget:
    """A server, and the arguments with which each tool reaches the server.

    Attributes:
        options: Connection options of grpcurl.
        address: Address for grpcurl, after the options.
        target: Address for the other tools.
        env: Holds the token, if the server requires one.
        metrics: Address of the metrics, ``HOST:PORT``.
    """

    child: Child
    options: tuple[str, ...]
    address: str
    target: str
    env: dict[str, str] = field(default_factory=dict)
    metrics: str = ""
