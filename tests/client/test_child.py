"""A child process from spawn to reap, with small scripts in place of the server."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner_client import errors
from runner_client.process.child import Child, exit_in_words
from runner_client.process.output import LineSplitter, Tail

READY = "print('1|1|tcp|127.0.0.1:5|grpc', flush=True)\n"
UNTIL_STDIN_ENDS = "import sys; sys.stdin.read()\n"
FOREVER = "import time; time.sleep(600)\n"

Spawn = Callable[[str], Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[Child] = []

    def start(script: str) -> Child:
        child = Child([sys.executable, "-c", script], environment={})
        children.append(child)
        child.start()
        return child

    yield start
    for child in children:
        child.close(grace_seconds=0.01)
        assert child.has_exited


def wait_for(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_the_ready_line_gives_the_address(spawn: Spawn) -> None:
    child = spawn(READY + UNTIL_STDIN_ENDS)
    ready = child.wait_ready(10)
    assert (ready.target, ready.port) == ("127.0.0.1:5", 5)
    assert not child.has_exited


def test_an_invalid_ready_line_is_quoted_in_the_error(spawn: Spawn) -> None:
    child = spawn("print('Loading checkpoint...', flush=True)\n" + READY + UNTIL_STDIN_ENDS)
    with pytest.raises(errors.RunnerUnavailableError, match=r"Loading checkpoint\.\.\."):
        child.wait_ready(10)


def test_an_exit_before_the_ready_line_is_raised_at_once_with_stderr(spawn: Spawn) -> None:
    begin = time.monotonic()
    child = spawn("import sys; sys.exit('libmlx.so: cannot open shared object file')")
    with pytest.raises(errors.RunnerExitedError, match="cannot open shared object") as caught:
        child.wait_ready(60)
    assert time.monotonic() - begin < 10
    assert caught.value.exit_code == 1
    assert caught.value.exit_reason == "exit code 1"
    assert caught.value.stderr_tail == ("libmlx.so: cannot open shared object file",)


def test_a_child_without_a_ready_line_times_out(spawn: Spawn) -> None:
    child = spawn(FOREVER)
    with pytest.raises(errors.RunnerTimeoutError) as caught:
        child.wait_ready(0.05)
    assert caught.value.phase == "start"
    assert caught.value.timeout_seconds == 0.05


def test_a_missing_program_is_named_in_the_error(tmp_path: Path) -> None:
    child = Child([str(tmp_path / "python")], environment={})
    with pytest.raises(errors.RunnerUnavailableError, match=r"cannot start .*python"):
        child.start()
    child.close(0.01)


def test_megabytes_without_a_newline_do_not_block_the_child(spawn: Spawn) -> None:
    noise = "import sys; sys.stderr.write('x' * 10_000_000); sys.stderr.flush()\n"
    child = spawn(noise + READY + UNTIL_STDIN_ENDS)
    assert child.wait_ready(30).port == 5
    child.close(grace_seconds=10)
    assert sum(map(len, child.stderr_tail)) <= 16 * 1024


def test_megabytes_on_stdout_after_the_ready_line_do_not_block_the_child(spawn: Spawn) -> None:
    noise = "import sys; print('x\\n' * 1_000_000, flush=True); print('end', file=sys.stderr)\n"
    child = spawn(READY + noise)
    child.wait_ready(10)
    wait_for(lambda: child.has_exited, 30)
    assert child.stderr_tail[-1] == "end"


def test_every_line_goes_to_the_log(spawn: Spawn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runner_client.child")
    child = spawn(READY + "import sys; print('one'); sys.exit('two')")

    def lines() -> list[str]:
        # Late lines of an earlier test's child have another pid.
        own = f"[{child.pid}] "
        return sorted(line for line in caplog.messages if line.startswith(own))

    # On a busy machine the exit is noticed before the last line is read.
    wait_for(lambda: child.has_exited and len(lines()) >= 2)
    assert lines() == [f"[{child.pid}] one", f"[{child.pid}] two"]


def test_an_error_quotes_only_the_stderr_of_its_own_child(spawn: Spawn) -> None:
    first = spawn("import sys; sys.exit('the first one failed')")
    wait_for(lambda: first.has_exited)
    second = spawn("import sys; sys.exit(3)")
    with pytest.raises(errors.RunnerExitedError) as caught:
        second.wait_ready(10)
    assert caught.value.stderr_tail == ()
    assert "first one" not in str(caught.value)
    assert "nothing to its standard error" in str(caught.value)


def test_close_sends_sigint_before_it_kills(spawn: Spawn) -> None:
    polite = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n"
    child = spawn(polite + READY + UNTIL_STDIN_ENDS)
    child.wait_ready(10)
    child.close(grace_seconds=30)
    assert child.exit_error().exit_code == 0


def test_a_child_that_ignores_sigint_is_killed_after_the_grace_time(spawn: Spawn) -> None:
    rude = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = spawn(rude + READY + FOREVER)
    child.wait_ready(10)
    begin = time.monotonic()
    child.close(grace_seconds=0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert child.exit_error().exit_code == -signal.SIGKILL


@pytest.mark.parametrize("how", ["ignored", "taken"])
def test_an_unavailable_exit_code_is_reported_as_unknown(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The kernel drops the code if SIGCHLD is ignored; a host may also reap any child itself."""
    if how == "ignored":
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    else:
        before, wait = signal.getsignal(signal.SIGCHLD), os.waitpid
        monkeypatch.setattr(os, "waitpid", lambda *args: wait(*args) and wait(*args))
    try:
        child = spawn(READY + FOREVER)
        child.wait_ready(10)
        os.kill(child.pid or 0, signal.SIGKILL)
        assert child.wait_exit(10)
        # The pid may be another process's by now: close must not signal it.
        child.close(grace_seconds=60)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert child.exit_code is None
    error = child.exit_error()
    assert error.exit_code is None
    assert "exit code is unknown" in error.exit_reason


def test_an_interrupt_during_close_kills_at_once(spawn: Spawn) -> None:
    rude = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = spawn(rude + READY + FOREVER)
    child.wait_ready(10)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        child.close(grace_seconds=60)
    assert child.has_exited
    assert time.monotonic() - begin < 5


def test_close_sends_one_signal_however_often_it_is_called(spawn: Spawn) -> None:
    count = (
        "import signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        + READY
        + "while not got: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "sys.exit(len(got))\n"
    )
    child = spawn(count)
    child.wait_ready(10)
    threads = [threading.Thread(target=child.close, args=(30,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert child.exit_error().exit_code == 1


def test_a_closed_child_never_starts() -> None:
    child = Child([sys.executable, "-c", FOREVER], environment={})
    child.close(1)
    with pytest.raises(errors.RunnerUnavailableError, match="closed"):
        child.start()
    assert child.pid is None


def test_close_ends_the_wait_for_the_ready_line(spawn: Spawn) -> None:
    child = spawn(FOREVER)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            child.wait_ready(60)
        except errors.RunnerUnavailableError as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    child.close(grace_seconds=0.05)
    waiter.join(10)
    assert type(caught[0]) is errors.RunnerUnavailableError
    assert "closed" in str(caught[0])


def test_a_child_outlives_the_thread_that_spawned_it(spawn: Spawn) -> None:
    children: list[Child] = []
    thread = threading.Thread(target=lambda: children.append(spawn(READY + UNTIL_STDIN_ENDS)))
    thread.start()
    thread.join()
    assert children[0].wait_ready(10).port == 5
    assert not children[0].wait_exit(0.3)


def test_a_child_runs_in_its_own_session(spawn: Spawn) -> None:
    child = spawn("import os, sys; sys.exit(f'{os.getsid(0) == os.getpid()}')")
    wait_for(lambda: child.has_exited)
    assert child.stderr_tail == ("True",)


def test_exit_callbacks_run_once(spawn: Spawn) -> None:
    calls: list[str] = []
    child = spawn(READY + UNTIL_STDIN_ENDS)
    child.on_exit(lambda: calls.append("before"))
    child.kill()
    wait_for(lambda: bool(calls))
    child.on_exit(lambda: calls.append("after"))
    assert calls == ["before", "after"]


def test_a_lost_connection_is_explained_by_the_exit(spawn: Spawn) -> None:
    child = spawn(READY + FOREVER)
    child.wait_ready(10)
    child.kill()
    error = child.explain(errors.RunnerUnavailableError("socket closed"))
    assert isinstance(error, errors.RunnerExitedError)
    assert error.exit_reason.startswith("killed by SIGKILL (signal 9)")
    assert "OOM" in error.exit_reason


def test_other_errors_are_not_explained_by_the_exit(spawn: Spawn) -> None:
    child = spawn("pass")
    wait_for(lambda: child.has_exited)
    error = errors.QueueFullError("full")
    assert child.explain(error) is error


def test_a_running_child_leaves_errors_unchanged(spawn: Spawn) -> None:
    child = spawn(READY + UNTIL_STDIN_ENDS)
    error = errors.RunnerUnavailableError("refused")
    assert child.explain(error) is error


def test_a_grandchild_that_holds_the_pipes_does_not_hide_the_exit(spawn: Spawn) -> None:
    script = (
        "import subprocess, sys\n"
        "held = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3)'])\n"
        "sys.exit('gone')"
    )
    begin = time.monotonic()
    child = spawn(script)
    with pytest.raises(errors.RunnerExitedError, match="gone"):
        child.wait_ready(30)
    assert time.monotonic() - begin < 3


def test_an_abandoned_child_exits(spawn: Spawn) -> None:
    child = spawn(READY + UNTIL_STDIN_ENDS)
    child.wait_ready(10)
    child.abandon()
    wait_for(lambda: child.has_exited)
    assert child.exit_error().exit_code == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (70, "exit code 70 (its engine failed twice in a row, or could not continue)"),
        (-11, "killed by SIGSEGV (signal 11)"),
        (
            -9,
            "killed by SIGKILL (signal 9); the OOM killer does this when memory runs out",
        ),
        (-200, "killed by a signal (signal 200)"),
    ],
)
def test_exit_codes_are_described(code: int, words: str) -> None:
    assert exit_in_words(code) == words


def test_lines_are_split_at_newlines() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"one\ntw") == ["one"]
    assert splitter.feed(b"o\r\n\nthree") == ["two", ""]
    assert splitter.flush() == ["three"]
    assert splitter.flush() == []


def test_a_line_keeps_its_first_4_kib() -> None:
    splitter = LineSplitter()
    for _ in range(100):
        assert splitter.feed(b"x" * 1000) == []
    assert splitter.feed(b"y\nnext\n") == ["x" * 4096, "next"]


def test_invalid_utf8_is_replaced() -> None:
    assert LineSplitter().feed(b"a\xffb\n") == ["a\ufffdb"]


def test_the_tail_keeps_50_lines_and_16_kib() -> None:
    tail = Tail()
    for number in range(60):
        tail.append(str(number))
    assert tail.lines() == tuple(str(number) for number in range(10, 60))
    for _ in range(10):
        tail.append("x" * 4096)
    assert tail.lines() == ("x" * 4096,) * 4
