"""Real server processes for tests, each with a client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.host.environment import child_environment
from runner_common.handshake import ReadyLine

DEADLINE_SECONDS = 30.0
BREAK_STEPS = """
import sys
from runner_server.mlx_backend.executor import MlxExecutor
run = MlxExecutor.run
def broken(self, item):
    # Row 0 is the one of the warm-up.
    if any(self._outside) or any(row.id for row in self._decoding.rows):
        {what}
    return run(self, item)
MlxExecutor.run = broken
import runner_server.app
runner_server.app._DRAIN_SECONDS = 0.3
from runner_server.__main__ import main
sys.exit(main())
"""


SLOW_LOAD = """
import sys, time
from runner_server.engine.request_registry import RequestRegistry
note_progress = RequestRegistry.note_progress
def slow(self, progress):
    note_progress(self, progress)
    time.sleep(0.01)
RequestRegistry.note_progress = slow
from runner_server.__main__ import main
sys.exit(main())
"""

COMPUTE = (
    "import mlx.core as mx; a = mx.ones((999, 999)); [mx.eval(a @ (a + i)) for i in range(999)]"
)


class Child:
    """A server process with a client and a log file."""

    def __init__(self, log: Path, *args: str, code: str | None = None, **env: str) -> None:
        how = ["-c", code] if code else ["-m", "runner_server"]
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *how, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # With the BLAS that a runner started by the client has.
                env=child_environment(os.environ | env, backend="cpu"),
            )
        assert self.process.stdout
        self.line = self.process.stdout.readline().decode()
        assert self.line, log.read_text()
        self.ready = ReadyLine.parse(self.line)
        self.channel = grpc.insecure_channel(
            self.ready.target, options=[("grpc.enable_http_proxy", 0)]
        )
        # Dropping the last reference to a call cancels it.
        self.calls: list[object] = []
        self.stub = runner_pb2_grpc.RunnerServiceStub(self.channel)

    def status(self) -> pb.StatusResponse:
        """Request the status."""
        return self.stub.Status(pb.StatusRequest(), timeout=DEADLINE_SECONDS)

    def load(self, model: Path, kv_bits: int = 0, parallel: int | None = None) -> None:
        """Load a model, with the default number of slots unless given."""
        request = pb.LoadRequest(model=str(model), kv_bits=kv_bits, parallel=parallel)
        self.stub.Load(request, timeout=DEADLINE_SECONDS)

    def complete(self, count: int) -> Iterator[pb.CompletionResponse]:
        """Start a completion of ``count`` tokens, with the end-of-text token banned."""
        options = pb.CompletionOptions(num_predict=count, logit_bias={0: -100})
        request = pb.CompletionRequest(prompt="def", options=options)
        call = self.stub.Completion(request, timeout=DEADLINE_SECONDS)
        self.calls.append(call)
        return call

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition by polling."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)

    def wait(self, timeout: float = DEADLINE_SECONDS) -> int:
        """Wait for the process to end and return the exit code."""
        return self.process.wait(timeout)

    def close(self) -> None:
        """Close the channel and the pipes, and kill the process if still running."""
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.process.wait()


@contextmanager
def running(log: Path, *args: str, code: str | None = None, **env: str) -> Iterator[Child]:
    child = Child(log / f"{len(list(log.iterdir()))}.log", *args, code=code, **env)
    try:
        yield child
    finally:
        child.close()
