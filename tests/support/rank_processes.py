"""Real ranks for tests: processes that hold a model together over loopback, without a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mlxrunner.v1 import runner_pb2 as pb
from support.server_child import DEADLINE_SECONDS, Child

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
THREE_HEADS = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
"""What a configuration needs so that three ranks can divide its heads."""


class Ranks:
    """Rank 0 with its client, and those that follow it.

    Attributes:
        first: Rank 0.
        followers: The processes of the others, by rank from 1 on.
    """

    def __init__(
        self, folder: Path, size: int, *args: str, follower_args: Sequence[str] = ()
    ) -> None:
        env = {"MLX_HOSTFILE": str(_hostfile(folder, size))}
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
        """All of them, rank 0 first."""
        return [self.first.process, *self.followers]

    def wait(self, timeout_seconds: float = DEADLINE_SECONDS) -> list[int]:
        """Waits until all have ended; returns their exit codes, rank 0's first."""
        end = time.monotonic() + timeout_seconds
        return [process.wait(max(0.01, end - time.monotonic())) for process in self.processes]

    def log(self) -> str:
        """What all wrote."""
        return "\n".join(path.read_text() for path in self.logs)

    def close(self) -> None:
        """Ends by their ids those that are still there."""
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
    """Starts ranks and ends them; ``follower_args`` are for all but rank 0."""
    with ExitStack() as stack:
        started = Ranks(folder, size, *args, follower_args=follower_args)
        stack.callback(started.close)
        yield started


def completion(prompt: str | Sequence[int], **options: Any) -> pb.CompletionRequest:
    """A request for a completion."""
    logprobs = options.pop("logprobs", None)
    request = pb.CompletionRequest(options=pb.CompletionOptions(**options), logprobs=logprobs)
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.prompt_token_ids.ids.extend(prompt)
    return request


def failure_of(call: Any) -> Any:
    """How a call ends that cannot succeed."""
    try:
        if isinstance(call, grpc.Future):
            call.result()
        else:
            for _ in call:
                pass
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeded")


def problem_of(error: Any) -> tuple[str, str]:
    """An error's reason, from its details, and its words."""
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
            env=os.environ | env | {"MLX_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )


def _hostfile(folder: Path, size: int) -> Path:
    """Where MLX's ring meets: free ports of this machine."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
        addresses = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    path = folder / "hosts.json"
    path.write_text(json.dumps(addresses))
    return path
