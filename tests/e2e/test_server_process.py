"""The server as a real process with a real model: start, signals, orphans and exit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_common.contract import HEALTH_SERVICES
from runner_common.handshake import ReadyLine
from support.server_child import BREAK_STEPS, COMPUTE, DEADLINE_SECONDS, SLOW_LOAD, Child, running
from support.sweeps import diagonal, sampled

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

Build = Callable[..., Path]
Phase = Callable[[Child, Path], None]
PROMISED_SECONDS = 2.0


def _at_once(_child: Child, _model: Path) -> None:
    """Do nothing: the engine thread is still importing MLX."""


def _idle(child: Child, _model: Path) -> None:
    child.wait_for(lambda: bool(child.status().device))


def _loading(child: Child, model: Path) -> None:
    child.calls.append(child.stub.Load.future(pb.LoadRequest(model=str(model))))
    child.wait_for(lambda: 10 < child.status().progress < 50)


def _decoding(child: Child, model: Path) -> None:
    child.load(model)
    call = child.complete(400)
    while not next(call).token_ids:
        pass


PHASES = [_at_once, _idle, _loading, _decoding]


@pytest.fixture(scope="session")
def deep(model_dir: Build) -> Path:
    """Build a model of many small layers, with a load long enough to observe."""
    return model_dir("llama", num_hidden_layers=60)


def test_stdout_has_the_ready_line_and_nothing_else(tmp_path: Path, model_dir: Build) -> None:
    with running(tmp_path) as child:
        assert child.line.startswith("1|1|tcp|127.0.0.1:")
        assert child.line.endswith("|grpc\n")
        child.load(model_dir())
        assert [message for message in child.complete(5)][-1].eval_count == 5  # noqa: C416
        status = child.status()
        assert (status.pid, status.state) == (child.process.pid, pb.STATE_ACTIVE)
        child.process.send_signal(signal.SIGINT)
        out, _ = child.process.communicate(timeout=DEADLINE_SECONDS)
        assert (out, child.process.returncode) == (b"", 0)
        assert "listening on" in child.log.read_text()


_BLOCKED_IMPORT = """
import sys, threading
import runner_server.app
from runner_server.mlx_backend.backend import MlxBackend
runner_server.app._DRAIN_SECONDS = 0.1
MlxBackend.open = lambda self: threading.Event().wait()
from runner_server.__main__ import main
sys.exit(main())
"""


def test_a_server_answers_while_it_still_imports_mlx(tmp_path: Path) -> None:
    with running(tmp_path, code=_BLOCKED_IMPORT) as child:
        health: Any = health_pb2_grpc.HealthStub(child.channel)
        for service in HEALTH_SERVICES:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health.Check(request, timeout=DEADLINE_SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        status = child.status()
        assert (status.state, status.device) == (pb.STATE_IDLE, "")
        assert status.server_version == metadata.version("mlx-grpc-runner")
        child.process.send_signal(signal.SIGTERM)
        assert child.wait() == 0, child.log.read_text()


def test_nothing_slow_is_imported_before_the_ready_line() -> None:
    code = "import sys, runner_server.launch; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {
        "email",
        "huggingface_hub",
        "importlib.metadata",
        "mlx",
        "mlx_lm",
        "numpy",
        "tokenizers",
        "transformers",
    }
    assert slow & set(done.stdout.split()) == set()


@pytest.mark.parametrize(("phase", "number"), diagonal(PHASES, [signal.SIGINT, signal.SIGTERM]))
def test_a_signal_stops_the_server_in_order(
    tmp_path: Path, socket_dir: Path, deep: Path, phase: Phase, number: signal.Signals
) -> None:
    path = socket_dir / "s"
    code = SLOW_LOAD if phase is _loading else None
    with running(tmp_path, "--listen", f"unix:{path}", code=code) as child:
        phase(child, deep)
        child.process.send_signal(number)
        assert child.wait() == 0, child.log.read_text()
        assert not path.exists()
        log = child.log.read_text()
        assert f"stopping on {number.name}" in log
        assert "Traceback" not in log


def test_a_signal_ends_streams_with_a_reason(tmp_path: Path, deep: Path) -> None:
    with running(tmp_path) as child:
        child.load(deep)
        call = child.complete(1000)
        next(call)
        child.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in str(caught.value.details())
        assert child.wait() == 0


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path, model_dir: Build) -> None:
    code = BREAK_STEPS.format(what="import threading; threading.Event().wait()").replace(
        "_DRAIN_SECONDS = 0.3", "_DRAIN_SECONDS = 60"
    )
    with running(tmp_path, code=code) as child:
        _hang(child, model_dir())
        child.process.send_signal(signal.SIGTERM)
        child.wait_for(lambda: "stopping on SIGTERM" in child.log.read_text())
        started = time.monotonic()
        child.process.send_signal(signal.SIGINT)
        assert child.wait() == 128 + signal.SIGINT
        assert time.monotonic() - started < PROMISED_SECONDS


@pytest.mark.parametrize("times", sampled([1, 4], [1]))
def test_a_hanging_step_does_not_block_the_exit(
    tmp_path: Path, model_dir: Build, times: int
) -> None:
    """The exit must not abort either, while a thread is still inside MLX."""
    code = BREAK_STEPS.format(what=COMPUTE)
    for _ in range(times):
        with running(tmp_path, code=code) as child:
            _hang(child, model_dir())
            child.process.send_signal(signal.SIGTERM)
            assert child.wait() == 0, child.log.read_text()
            assert "did not end" in child.log.read_text()


def test_a_dead_engine_ends_the_process_with_code_70(tmp_path: Path, model_dir: Build) -> None:
    code = BREAK_STEPS.format(what="raise RuntimeError('broken on purpose')")
    for _ in range(2):
        with running(tmp_path, code=code) as child:
            child.load(model_dir())
            for _ in range(2):
                with pytest.raises(grpc.RpcError):
                    list(child.complete(3))
            assert child.wait() == 70, child.log.read_text()


def _hang(child: Child, model: Path) -> None:
    child.load(model)
    child.complete(5)
    child.wait_for(lambda: child.status().running_count == 1)


@pytest.mark.parametrize("phase", sampled(PHASES, [_at_once, _decoding]))
def test_a_server_exits_when_its_stdin_closes(tmp_path: Path, deep: Path, phase: Phase) -> None:
    code = SLOW_LOAD if phase is _loading else None
    with running(tmp_path, "--exit-with-parent", code=code) as child:
        phase(child, deep)
        assert child.process.stdin
        child.process.stdin.close()
        started = time.monotonic()
        child.wait()
        assert time.monotonic() - started < PROMISED_SECONDS
        assert child.process.returncode in (0, 1)


_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "runner_server", "--exit-with-parent"],
                         stdin=subprocess.STDIN)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stdin", ["PIPE", "DEVNULL"])
def test_a_server_exits_with_a_killed_parent(tmp_path: Path, stdin: str) -> None:
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT.replace("STDIN", stdin)],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    address = ReadyLine.parse(parent.stdout.readline().decode()).target
    with grpc.insecure_channel(address) as channel:
        stub = runner_pb2_grpc.RunnerServiceStub(channel)
        assert stub.Status(pb.StatusRequest(), timeout=DEADLINE_SECONDS).pid == pid
    parent.kill()
    started = time.monotonic()
    # The server's exit closes the pipe that it shared with its parent.
    assert parent.stdout.read() == b""
    assert time.monotonic() - started < PROMISED_SECONDS
    parent.stdout.close()
    parent.wait()


def test_without_the_option_a_server_outlives_its_stdin(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        assert child.process.stdin
        child.process.stdin.close()
        _idle(child, tmp_path)
        assert child.status().state == pb.STATE_IDLE


def test_the_exit_never_aborts(tmp_path: Path, model_dir: Build) -> None:
    for _ in range(5):
        with running(tmp_path, "--model", str(model_dir())) as child:
            child.wait_for(lambda c=child: c.status().state == pb.STATE_ACTIVE)  # type: ignore[misc]
            assert list(child.complete(3))[-1].done
            child.process.send_signal(signal.SIGINT)
            assert child.wait() == 0, child.log.read_text()


def test_a_second_server_on_the_same_port_fails_with_a_message(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        second = subprocess.run(
            [sys.executable, "-m", "runner_server", "--listen", child.ready.address],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        assert second.returncode == 1
        assert f"cannot listen on {child.ready.address}" in second.stderr
        assert "Traceback" not in second.stderr
        assert second.stdout == ""
        assert child.status().pid == child.process.pid


def test_a_server_exits_if_the_model_of_its_command_line_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner_server", "--model", "/nowhere/at/all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "no model at '/nowhere/at/all'" in done.stderr
    assert "exiting" in done.stderr
    assert "Traceback" not in done.stderr


def test_proxy_variables_are_ignored(tmp_path: Path, model_dir: Build) -> None:
    proxy = "http://127.0.0.1:9"
    with running(tmp_path, http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy) as child:
        child.load(model_dir())
        assert list(child.complete(2))[-1].eval_count == 2


def test_unload_frees_the_memory(tmp_path: Path, model_dir: Build) -> None:
    with running(tmp_path) as child:
        for _ in range(2):
            child.load(model_dir())
            held = child.status()
            assert held.memory_usage.active_bytes >= held.model.weight_bytes
            assert list(child.complete(20))[-1].done
            freed = child.stub.Unload(pb.UnloadRequest(), timeout=DEADLINE_SECONDS).freed_bytes
            assert freed >= held.model.weight_bytes
            usage = child.status().memory_usage
            assert usage.active_bytes < 4096
            assert usage.cache_bytes == 0
