"""Fault 8: jumping clocks, and hosts without /proc, a temporary folder, stdout or UTF-8.

Hosts with and without control groups: tests/common/test_host_memory.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runner_client import Options, RunnerClient, RunnerProcess, Timeouts, errors
from runner_common.host_memory.free import Host, free_memory
from support.fake_child import wait_until
from support.faulty import end_of, fake_engine, hooked, use_fake_engine

SHORT = Options(num_predict=3, temperature=0)

JUMPING_CLOCK = """
import itertools, time
clock, jumps = time.time, itertools.cycle([0.0, 3e8, -3e8, 86_400.0, -3600.0])
time.time = lambda: clock() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.mlx
def test_a_jumping_clock_changes_nothing(model: str, tmp_path: Path) -> None:
    """Each reading of the wall clock jumps by up to ten years; spans use the monotonic clock.

    The caller's clock does not jump: gRPC makes deadlines from it at the start of a call.
    """
    limits = Timeouts(
        start_seconds=30,
        load_seconds=10,
        first_token_seconds=10,
        idle_seconds=10,
        stall_seconds=10,
    )
    began = time.monotonic()
    env = hooked(tmp_path, JUMPING_CLOCK)
    with RunnerProcess(model, env=env, timeouts=limits) as runner:
        for _ in range(3):
            done = runner.complete("def", options=SHORT)
            spans = (done.queue_seconds, done.prompt_eval_seconds, done.eval_seconds)
            assert all(0 <= span < 10 for span in spans)
        status = runner.status()
        assert 0 < status.uptime_seconds < time.monotonic() - began
        assert status.last_progress_age_seconds is None
    assert runner.exit_code == 0


@pytest.mark.mlx
def test_without_proc_a_runner_still_measures_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", "/nowhere")
    env = hooked(tmp_path, "import psutil; psutil.PROCFS_PATH = '/nowhere'")
    with RunnerProcess(model, env=env) as runner:
        assert runner.complete("def", options=SHORT).eval_count == 3
        usage = runner.status().memory_usage
        assert usage.process_bytes > usage.active_bytes > 0
        assert usage.limit_bytes > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_without_proc_and_cgroups_the_system_limits_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = free_memory().system_bytes
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    free = free_memory(Host(root=tmp_path))
    assert (free.source, free.cgroup_bytes) == ("system", None)
    # The size of the page cache is unknown then.
    assert 0 < free.available_bytes < usual * 1.2


HIDE_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]


def _can_hide_proc() -> bool:
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    return subprocess.run([*HIDE_PROC, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.mlx
@pytest.mark.skipif(not _can_hide_proc(), reason="mount namespaces are not allowed here")
def test_a_runner_works_with_an_empty_proc(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = [sys.executable, "-P", "-m", "runner_server", "--exit-with-parent", "--listen"]
    monkeypatch.setattr(
        "runner_client.process.launch.server_command", lambda listen: [*HIDE_PROC, *server, listen]
    )
    with RunnerProcess(model) as runner:
        assert runner.complete("def", options=SHORT).eval_count == 3
        assert runner.status().memory_usage.process_bytes > 2**20


NO_TEMPORARY = """
import tempfile

def none():
    raise FileNotFoundError(2, "no usable temporary directory")

tempfile.gettempdir = none
"""


@pytest.mark.mlx
@pytest.mark.parametrize("code", ["", NO_TEMPORARY], ids=["TMPDIR", "none at all"])
def test_a_runner_works_without_a_temporary_directory(
    model: str, tmp_path: Path, code: str
) -> None:
    """MLX compiles kernels there. A file instead of the folder fails like a read-only folder."""
    (tmp_path / "no-folder").touch()
    env = {**hooked(tmp_path, code), "TMPDIR": str(tmp_path / "no-folder")}
    with RunnerProcess(model, env=env) as runner:
        assert runner.complete("def", options=SHORT).eval_count == 3


def test_a_read_only_socket_folder_is_reported(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> str:
        raise OSError(30, "Read-only file system")

    use_fake_engine(monkeypatch)
    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    runner = RunnerProcess(stub, listen="unix")
    with pytest.raises(errors.RunnerUnavailableError, match="Read-only file system") as caught:
        runner.load()
    assert 'listen="tcp"' in str(caught.value)
    assert runner.pid is None
    monkeypatch.undo()


@contextmanager
def started(path: Path, stdout: int | None, *front: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on a unix socket, with an unusable standard output."""
    command = [*front, *fake_engine(), "--listen", f"unix:{path}"]
    process = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        wait_until(path.exists)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["closed", "full", "a pipe without a reader"])
def test_a_server_works_without_stdout(socket_dir: Path, how: str) -> None:
    """The ready line tells a parent the address, which this caller has chosen itself."""
    path, pipe = socket_dir / "s", os.pipe()
    with Path("/dev/full").open("wb") as full:
        out = {"closed": None, "full": full.fileno()}.get(how, pipe[1])
        front = ("sh", "-c", 'exec "$@" >&-', "sh") if how == "closed" else ()
        os.close(pipe[0])
        with started(path, out, *front) as process, RunnerClient(f"unix:{path}") as client:
            os.close(pipe[1])
            wait_until(lambda: end_of(client.is_serving) is None)
            client.load("fake")
            assert client.complete("x", options=SHORT).eval_count == 3
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
            assert process.returncode == 0
            assert b"the ready line cannot be printed" in log
            assert b"Traceback" not in log


LOCALE = """
from pathlib import Path
from runner_client import Options, RunnerProcess, errors

path, text = {path!r}, {text!r}
with RunnerProcess(path) as runner:
    assert runner.status().model.path == path, runner.status().model.path
    assert runner.detokenize(runner.tokenize(text)) == text
    done = runner.complete(text, options=Options(num_predict=3, temperature=0))
    assert done.eval_count == 3
    try:
        runner.client.load(path + "/nichts\u00df")
    except errors.ModelNotFoundError as error:
        assert error.model == path + "/nichts\u00df", ascii(error.model)
    else:
        raise AssertionError
print("well")
"""


@pytest.mark.mlx
@pytest.mark.parametrize("variables", [{"LANG": "C"}, {"LC_ALL": "POSIX"}], ids=str)
def test_the_c_locale_changes_no_text(
    model: str, tmp_path: Path, variables: dict[str, str]
) -> None:
    path = Path(shutil.copytree(model, tmp_path / "mod\u00e8le \u6a21\u578b"))
    text = "na\u00efve \u65e5\u672c\u8a9e \U0001f600"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sys.executable, "-c", LOCALE.format(path=str(path), text=text)],
        env={**kept, **variables},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"well\n", done.stderr.decode(errors="replace")
