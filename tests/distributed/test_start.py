"""Starting ranks with mlx.launch, and wrong ways to start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from click.testing import CliRunner

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.cli import serve
from runner_common.handshake import ReadyLine
from runner_server.config import parse_args
from runner_server.launch_ranks import _host_of_rank_0
from support.patient_ring import patience
from support.rank_processes import DEMO, completion
from support.server_child import DEADLINE_SECONDS

BIN = Path(sys.executable).parent


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports."""
    for first in range(32_500, 60_000, 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no ports are free")


@pytest.mark.mlx
def test_mlx_launch_starts_ranks_that_end_together(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    ranks = ["-n", "2", "--backend", "ring", "--starting-port", str(free_ports(2))]
    serving = [str(BIN / "mlx-runner"), "serve", "--distributed", "--model", str(DEMO)]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        launcher = subprocess.Popen(
            [str(BIN / "mlx.launch"), *ranks, "--", *serving],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **patience()},
        )
    assert launcher.stdout
    try:
        line = launcher.stdout.readline().decode()
        assert line, log.read_text()
        with grpc.insecure_channel(ReadyLine.parse(line).target) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            pids = wait_for_model(stub)
            request = completion("def", temperature=0, num_predict=5)
            assert [message.eval_count for message in stub.Completion(request)][-1] == 5
        os.kill(pids[0], signal.SIGTERM)
        # stdout has the ready line and nothing after.
        out, _ = launcher.communicate(timeout=DEADLINE_SECONDS)
        assert (out, launcher.returncode) == (b"", 0), log.read_text()
        assert not any(map(psutil.pid_exists, pids))
    finally:
        # The ranks end with the launcher.
        launcher.kill()
        launcher.communicate()


def wait_for_model(stub: runner_pb2_grpc.RunnerServiceStub) -> list[int]:
    """Wait for the ranks' model and return their process ids."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        status = stub.Status(pb.StatusRequest(), wait_for_ready=True, timeout=DEADLINE_SECONDS)
        if status.state == pb.STATE_ACTIVE:
            return [rank.pid for rank in status.ranks]
        time.sleep(0.02)
    raise AssertionError("the model was not loaded")


def test_without_a_launcher_the_error_says_how_to_start_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    command = [sys.executable, "-m", "runner_server", "--distributed"]
    done = subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=DEADLINE_SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "start all ranks with mlx.launch" in done.stderr


def test_a_pipeline_needs_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--pipeline"])
    assert "--pipeline needs --distributed" in capsys.readouterr().err
    config = parse_args(["--distributed", "--pipeline"])
    assert (config.distributed, config.pipeline) == (True, True)
    config = parse_args([])
    assert (config.distributed, config.pipeline) == (False, False)


def test_serve_passes_both_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(serve, "_become", lambda line, _environment: lines.append(line))
    result = CliRunner().invoke(serve.command, ["--distributed", "--pipeline", "--blas", "off"])
    assert result.exit_code == 0, result.output
    assert lines[0][-2:] == ["--distributed", "--pipeline"]


HOSTS: list[tuple[Callable[[Path], dict[str, str]], str]] = [
    (lambda file: {"MLX_HOSTFILE": str(file)}, "10.0.0.1"),
    (lambda _: {"MLX_JACCL_COORDINATOR": "10.0.0.2:32323"}, "10.0.0.2"),
    (lambda _: {"MLX_JACCL_COORDINATOR": "[fe80::2]:32323"}, "fe80::2"),
    (lambda _: {"NCCL_HOST_IP": "10.0.0.3"}, "10.0.0.3"),
    (lambda _: {}, "127.0.0.1"),
]


@pytest.mark.parametrize(("environment", "host"), HOSTS)
def test_the_host_of_rank_0_comes_from_the_launcher(
    environment: Callable[[Path], dict[str, str]],
    host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "hosts.json"
    file.write_text('[["10.0.0.1:5", "10.0.1.1:5"], ["10.0.0.9:6"]]')
    for name, value in environment(file).items():
        monkeypatch.setenv(name, value)
    assert _host_of_rank_0() == host


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_wrong_variable_is_named_before_ranks_wait_for_each_other(rank: str | None) -> None:
    env = os.environ | {"MLX_RUNNER_GPU_OVERHEAD": "much"}
    done = subprocess.run(
        [sys.executable, "-m", "runner_server", "--distributed"],
        env=env | ({"MLX_RANK": rank} if rank else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 1
    assert "MLX_RUNNER_GPU_OVERHEAD" in done.stderr
    assert "cannot join" not in done.stderr
