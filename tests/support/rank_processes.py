"""Distributed ranks as local processes, started without a launcher."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.host.environment import child_environment
from support.patient_ring import patience
from support.server_child import DEADLINE_SECONDS, Child

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
THREE_HEADS = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
"""Settings with which three ranks can divide the heads of a model."""


class Ranks:
    """Rank 0 with a client, and the follower ranks.

    Attributes:
        first: Rank 0.
        followers: Processes of ranks 1 and up, in order.
    """

    def __init__(
        self, folder: Path, size: int, *args: str, follower_args: Sequence[str] = ()
    ) -> None:
        env = {"MLX_HOSTFILE": str(_hostfile(folder, size)), **patience()}
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.followers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, size):
                self.followers.append(
                    _follower(self.logs[rank], rank, *args, *follower_args, **env)
                )
            self.first = Child(
                self.logs[0], "--distributed", *args, OMP_NUM_THREADS="1", MLX_RANK="0", **env
            )
        except BaseException:
            self._kill_followers()
            raise

    @property
    def processes(self) -> list[subprocess.Popen[Any]]:
        """Processes of every rank, rank 0 first."""
        return [self.first.process, *self.followers]

    def wait(self, timeout_seconds: float = DEADLINE_SECONDS) -> list[int]:
        """Wait until every rank has ended; return the exit codes, rank 0 first."""
        end = time.monotonic() + timeout_seconds
        return [process.wait(max(0.01, end - time.monotonic())) for process in self.processes]

    def log(self) -> str:
        """Return the joined logs of every rank."""
        return "\n".join(path.read_text() for path in self.logs)

    def close(self) -> None:
        """Kill the ranks still running."""
        self.first.close()
        self._kill_followers()

    def _kill_followers(self) -> None:
        for process in self.followers:
            if process.poll() is None:
                process.kill()
            process.wait()


@contextmanager
def ranks(
    folder: Path, size: int, *args: str, follower_args: Sequence[str] = ()
) -> Iterator[Ranks]:
    """Run ranks for the duration of a block; ``follower_args`` go to ranks 1 and up."""
    with ExitStack() as stack:
        started = Ranks(folder, size, *args, follower_args=follower_args)
        stack.callback(started.close)
        yield started


def completion(prompt: str | Sequence[int], **options: Any) -> pb.CompletionRequest:
    """Return a completion request."""
    logprobs, constraint = options.pop("logprobs", None), options.pop("constraint", None)
    request = pb.CompletionRequest(
        options=pb.CompletionOptions(**options), logprobs=logprobs, constraint=constraint
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.prompt_token_ids.ids.extend(prompt)
    return request


def failure_of(action: Callable[[], object]) -> Any:
    """Return the error of an action, which must fail."""
    try:
        action()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeded")


def problem_of(error: Any) -> tuple[str, str]:
    """Return the reason and the message of an error, read from the status details."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason), status.message


def _follower(log: Path, rank: int, *args: str, **env: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "runner_server", "--distributed", *args],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=child_environment(
                os.environ | env | {"MLX_RANK": str(rank), "OMP_NUM_THREADS": "1"}, backend="cpu"
            ),
        )


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(20_000 + 1000 * _WORKER, 21_000 + 1000 * _WORKER))
"""Ports of this process of tests, below those that the system gives to others who ask for any."""


def _free_port() -> int:
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def _hostfile(folder: Path, size: int) -> Path:
    """Write the host file of MLX's ring, with free local ports."""
    addresses = [[f"127.0.0.1:{_free_port()}"] for _ in range(size)]
    path = folder / "hosts.json"
    path.write_text(json.dumps(addresses))
    return path
