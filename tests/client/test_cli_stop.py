"""The command ``stop``: ends a runner of this machine, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.errors import RunnerUnavailableError
from runner_client.process.local_runner import local_process
from runner_client.rpc.messages.responses import status as status_of
from runner_client.testing import fake_runner
from runner_common.handshake import ReadyLine
from support.command_line import invoke
from support.faulty import fake_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Start = Callable[..., tuple[subprocess.Popen[bytes], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server with a fake model library; return the process and the address."""
    processes: list[subprocess.Popen[bytes]] = []

    def start_(*args: str, **env: str) -> tuple[subprocess.Popen[bytes], str]:
        process = subprocess.Popen(
            [*fake_engine(), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | env,
        )
        processes.append(process)
        assert process.stdout
        return process, ReadyLine.parse(process.stdout.readline().decode()).target

    yield start_
    for process in processes:
        process.kill()
        assert process.stdout
        process.stdout.close()
        process.wait()


def test_stop_ends_a_runner_in_order(start: Start) -> None:
    process, address = start()
    result = invoke("stop", address)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"process {process.pid} has ended\n"
    assert process.wait(20) == 0


def test_stop_finds_a_runner_on_a_unix_socket(start: Start, socket_dir: Path) -> None:
    process, address = start("--listen", f"unix:{socket_dir}/socket")
    assert address == f"unix:{socket_dir}/socket"
    assert invoke("stop", address).exit_code == 0
    assert process.wait(20) == 0


def test_stop_needs_the_runners_token(start: Start) -> None:
    process, address = start(MLX_RUNNER_TOKEN="t" * 32)
    result = invoke("stop", address)
    assert result.exit_code == 1
    assert "token" in result.stderr
    assert process.poll() is None


@pytest.mark.parametrize("pid", ["another process", "no process"])
def test_a_process_that_does_not_listen_there_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch, pid: str
) -> None:
    """Behind a forwarded port the process id belongs to another machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with fake_runner() as runner:
            named = other.pid if pid == "another process" else 2**22 + 1
            monkeypatch.setattr("runner_client.testing.fake.os.getpid", lambda: named)
            result = invoke("stop", runner.address)
        assert result.exit_code == 1
        assert f"is process {named} where it runs" in result.stderr
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


def test_an_address_where_nothing_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    result = invoke("stop", address)
    assert result.exit_code == 1
    assert address in result.stderr


def test_a_process_with_the_same_number_and_port_on_another_machine_is_not_stopped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status = status_of(pb.StatusResponse(pid=os.getpid()))
        assert local_process(f"127.0.0.1:{port}", status).pid == os.getpid()
        assert local_process(f"localhost:{port}", status).pid == os.getpid()
        # An address for documentation (RFC 5737), which no machine has.
        with pytest.raises(RunnerUnavailableError, match="on its own machine"):
            local_process(f"192.0.2.1:{port}", status)
