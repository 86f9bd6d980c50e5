"""grpc_health_probe against a real server, and against none."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from runner_common.handshake import HEALTH_SERVICES
from support.certificates import Authority
from support.external_tools import ROOT, Run, ToolTarget
from support.server_child import BREAK_STEPS, running

WAIT = ("-connect-timeout=10s", "-rpc-timeout=10s")
CANNOT_CONNECT, NO_ANSWER, NOT_SERVING = 2, 3, 4
HANGS = BREAK_STEPS.format(what="import threading; threading.Event().wait()")
DRAINS_LONG = HANGS.replace("_DRAIN_SECONDS = 0.3", "_DRAIN_SECONDS = 20")


@pytest.mark.parametrize("service", HEALTH_SERVICES)
def test_it_serves(run: Run, place: ToolTarget, service: str) -> None:
    """Without a token too: a probe needs to know no secrets."""
    done = run("grpc_health_probe", f"-addr={place.target}", f"-service={service}", *WAIT)
    assert done.returncode == 0, done.stderr
    assert "status: SERVING" in done.stdout + done.stderr


def test_a_service_that_there_is_not(run: Run, place: ToolTarget) -> None:
    done = run("grpc_health_probe", f"-addr={place.target}", "-service=nobody", *WAIT)
    assert done.returncode == NO_ANSWER
    assert "NotFound" in done.stderr


def test_nobody_listens(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host, port = taken.getsockname()
        done = run("grpc_health_probe", f"-addr={host}:{port}", "-connect-timeout=500ms")
    assert done.returncode == CANNOT_CONNECT
    assert "failed to connect" in done.stderr


def test_a_process_that_is_stopped(run: Run, tmp_path: Path) -> None:
    with running(tmp_path) as child:
        child.process.send_signal(signal.SIGSTOP)
        done = run("grpc_health_probe", f"-addr={child.ready.target}", "-rpc-timeout=500ms")
    # The kernel takes the connection, and nobody speaks on it.
    assert done.returncode == CANNOT_CONNECT, done.stderr
    assert "timeout" in done.stderr


def test_a_runner_that_drains(run: Run, tmp_path: Path) -> None:
    with running(tmp_path, code=DRAINS_LONG) as child:
        child.load(ROOT / "runner_server/demo/model")
        child.complete(5)
        child.wait_for(lambda: child.status().running_count == 1)
        child.process.send_signal(signal.SIGTERM)
        probe = ("grpc_health_probe", f"-addr={child.ready.target}", *WAIT)
        child.wait_for(lambda: run(*probe).returncode == NOT_SERVING)


def test_over_tls(run: Run, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    (logs := tmp_path / "logs").mkdir()
    with running(logs, "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)) as child:
        address = f"-addr={child.ready.target}"
        trusted = run("grpc_health_probe", address, "-tls", f"-tls-ca-cert={authority.file}", *WAIT)
        assert trusted.returncode == 0, trusted.stderr
        plain = run("grpc_health_probe", address, "-connect-timeout=500ms")
        assert plain.returncode == CANNOT_CONNECT
