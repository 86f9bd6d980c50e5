"""What the tests of tests/tools share: programs of others, and where they are pointed at."""

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
TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test

Done = subprocess.CompletedProcess[str]


class Run(Protocol):
    """Runs a program in the root of the repository, with the tools on its path."""

    def __call__(self, name: str, *args: str, **env: str) -> Done:
        """Both outputs and the exit code; ``env`` is put beside this process's own."""
        ...


@dataclass(frozen=True)
class Place:
    """A server, and how the tools are told where it is.

    Attributes:
        options: What grpcurl needs to reach it.
        address: As grpcurl takes it, after its options.
        target: As the others take it.
        env: Has the token, if it wants one.
        metrics: The address of its metrics, ``HOST:PORT``.
    """

    child: Child
    options: tuple[str, ...]
    address: str
    target: str
    env: dict[str, str] = field(default_factory=dict)
    metrics: str = ""
