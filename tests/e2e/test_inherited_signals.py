"""Signals blocked or ignored by a parent, and signals during the start of a server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runner_client import Options, RunnerProcess

ROOT = Path(__file__).parents[2]
SHORT = Options(num_predict=3, temperature=0)
STOPS = [signal.SIGINT, signal.SIGTERM]
SERVER = ("-P", "-m", "runner_server", "--listen", "127.0.0.1:0")
COMMAND = ("-P", "-m", "runner_common.console", "serve")
AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child")

SLOW_IMPORT = """
import os, time
os.write(1, b"importing\\n")
time.sleep(600)
"""
"""Stands in for the package grpc."""

WAITING_START = """
import os, sys
if "runner_server" in sys.orig_argv:
    os.write(1, b"starting\\n")
    os.read(0, 1)
"""
"""Run by Python, as ``sitecustomize``, before the program's first line."""


def _can_be_process_1() -> bool:
    if not shutil.which("unshare"):
        return False
    command = [*AS_PROCESS_1, "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _can_be_process_1(), reason="process namespaces are not allowed here"
)


@contextmanager
def started(
    arguments: Sequence[str],
    hook: Path,
    front: Sequence[str] = (),
) -> Iterator[subprocess.Popen[str]]:
    """Start a process and wait for the first line of output."""
    path = os.pathsep.join(map(str, (hook, ROOT, ROOT / "proto")))
    process = subprocess.Popen(
        [*front, sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def slow_import(tmp_path: Path) -> Path:
    """Return a folder with a package grpc that takes ten minutes to import."""
    (tmp_path / "grpc").mkdir()
    (tmp_path / "grpc/__init__.py").write_text(SLOW_IMPORT)
    return tmp_path


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_during_the_imports_ends_the_server_at_once(
    slow_import: Path, number: signal.Signals
) -> None:
    with started(SERVER, slow_import) as process:
        process.send_signal(number)
        assert process.wait() == 0


@needs_namespaces
@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("arguments", [SERVER, COMMAND], ids=["server", "command"])
def test_a_signal_during_the_imports_ends_process_1_at_once(
    slow_import: Path, number: signal.Signals, arguments: tuple[str, ...]
) -> None:
    """The kernel ignores signals for which process 1 of a container has no handler."""
    with started(arguments, slow_import, AS_PROCESS_1) as unshare:
        (first,) = psutil.Process(unshare.pid).children()
        first.send_signal(number)
        assert unshare.wait() == (0 if arguments is SERVER else 128 + number)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_while_serve_execs_the_server_is_not_lost(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WAITING_START)
    with started(COMMAND, tmp_path) as process:
        process.send_signal(number)
        assert process.stdin
        process.stdin.write("x")
        process.stdin.flush()
        assert process.wait() == 0


@pytest.fixture
def blocked_stops() -> Iterator[None]:
    """Block both signals on this thread, for children to inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.usefixtures("blocked_stops")
def test_a_server_started_with_blocked_signals_stops(
    tmp_path: Path, number: signal.Signals
) -> None:
    with started(SERVER, tmp_path) as process:
        process.send_signal(number)
        assert process.wait() == 0


@pytest.fixture
def own_kernels(tmp_path: Path) -> dict[str, str]:
    """Return variables of a runner without compiled kernels."""
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp")}


@pytest.mark.mlx
@pytest.mark.usefixtures("blocked_stops")
def test_a_host_that_blocks_signals_can_stop_its_child(model_dir: Callable[..., Path]) -> None:
    with RunnerProcess(str(model_dir())) as runner:
        pass
    assert runner.exit_code == 0


@pytest.mark.mlx
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_host_that_ignores_sigchld_gets_a_runner_that_does_not(
    model_dir: Callable[..., Path], tmp_path: Path, own_kernels: dict[str, str]
) -> None:
    """MLX needs the exit status of g++."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with RunnerProcess(str(model_dir()), env=own_kernels) as runner:
            assert runner.complete("def", options=SHORT).eval_count == 3
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert runner.exit_code is None
    if mx.default_device() == mx.Device(mx.cpu):
        assert [file for file in tmp_path.rglob("lib*.so") if "check" not in file.name]
