"""grpc_health_probe against real servers, and without a server."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from runner_common.contract import HEALTH_SERVICES
from support.certificates import Authority
from support.external_tools import ROOT, Run, ToolTarget
from support.server_child import BREAK_STEPS, running

WAIT = ("-connect-timeout=10s", "-rpc-timeout=10s")
CANNOT_CONNECT, NO_ANSWER, NOT_SERVING = 2, 3, 4
HANGS = BREAK_STEPS.format(what="import threading; threading.Event().wait()")
DRAINS_LONG = HANGS.replace("_DRAIN_SECONDS = 0.3", "_DRAIN_SECONDS = 20")


@pytest.mark.parametrize("service", HEALTH_SERVICES)
def test_every_service_is_serving(run: Run, place: ToolTarget, service: str) -> None:
    """Health needs no token, so probes need no secrets."""
    done = run("grpc_health_probe", f"-addr={place.target}", f"-service={service}", *WAIT)
    assert done.returncode == 0, done.stderr
    assert "status: SERVING" in done.stdout + done.stderr


def test_an_unknown_service_is_not_found(run: Run, place: ToolTarget) -> None:
    done = run("grpc_health_probe", f"-addr={place.target}", "-service=unknown", *WAIT)
    assert done.returncode == NO_ANSWER
    assert "NotFound" in done.stderr


def test_a_closed_port_cannot_be_connected(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host, port = taken.getsockname()
        done = run("grpc_health_probe", f"-addr={host}:{port}", "-connect-timeout=500ms")
    assert done.returncode == CANNOT_CONNECT
    assert "failed to connect" in done.stderr


def test_a_suspended_process_times_out(run: Run, tmp_path: Path) -> None:
    with running(tmp_path) as child:
        child.process.send_signal(signal.SIGSTOP)
        done = run("grpc_health_probe", f"-addr={child.ready.target}", "-rpc-timeout=500ms")
    # The kernel accepts the connection, but the process does not answer.
    assert done.returncode == CANNOT_CONNECT, done.stderr
    assert "timeout" in done.stderr


def test_a_draining_runner_is_not_serving(run: Run, tmp_path: Path) -> None:
    with running(tmp_path, code=DRAINS_LONG) as child:
        child.load(ROOT / "runner_server/demo/model")
        child.complete(5)
        child.wait_for(lambda: child.status().running_count == 1)
        child.process.send_signal(signal.SIGTERM)
        probe = ("grpc_health_probe", f"-addr={child.ready.target}", *WAIT)
        child.wait_for(lambda: run(*probe).returncode == NOT_SERVING)


def test_the_probe_works_over_tls(run: Run, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    (logs := tmp_path / "logs").mkdir()
    with running(logs, "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)) as child:
        address = f"-addr={child.ready.target}"
        trusted = run("grpc_health_probe", address, "-tls", f"-tls-ca-cert={authority.file}", *WAIT)
        assert trusted.returncode == 0, trusted.stderr
        plain = run("grpc_health_probe", address, "-connect-timeout=500ms")
        assert plain.returncode == CANNOT_CONNECT
