"""Fault 2: the death of a process mid-step, as reported by the client."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from runner_client import AsyncRunnerProcess, Options, RunnerProcess, Timeouts, errors
from support.fake_child import wait_until
from support.faulty import BREAK, breaking, end_of, hooked, in_threads, pid_of, use_fake_engine
from support.process_view import ProcessView

PROMISED_SECONDS = 1.0
SHORT = Options(num_predict=3, temperature=0, logit_bias={0: -100})

# The last line is written past Python's buffers, as C++ does.
DEATHS = {
    "abort": (
        "import os; os.write(2, b'libc++abi: terminating: [METAL] timed out\\n'); os.abort()",
        -signal.SIGABRT,
        "killed by SIGABRT (signal 6)",
        "[METAL] timed out",
    ),
    "segfault": (
        "import ctypes; ctypes.string_at(0)",
        -signal.SIGSEGV,
        "killed by SIGSEGV (signal 11)",
        "listening on",
    ),
    "oom killer": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
        "killed by SIGKILL (signal 9); the OOM killer does this",
        "listening on",
    ),
    "bus error": (
        "import os, signal; os.kill(os.getpid(), signal.SIGBUS)",
        -signal.SIGBUS,
        "killed by SIGBUS",
        "listening on",
    ),
    "sys.exit in a step": ("import sys; sys.exit(3)", 70, "exit code 70", "SystemExit: 3"),
    "exit without a message": ("import os; os._exit(5)", 5, "exit code 5", "listening on"),
}


@pytest.mark.mlx
@pytest.mark.parametrize("death", DEATHS)
def test_the_client_reports_how_a_child_died(model: str, tmp_path: Path, death: str) -> None:
    what, code, words, last_line = DEATHS[death]
    with RunnerProcess(model, env=hooked(tmp_path, breaking(what))) as runner:
        known = runner.status().memory_usage.process_bytes
        began = time.monotonic()
        first = end_of(lambda: runner.complete("def", options=SHORT, request_id=BREAK))
        wait_until(lambda: runner.has_exited, 20)
        assert time.monotonic() - began < PROMISED_SECONDS + 1 * (code == 70)
        error = end_of(lambda: runner.complete("def", options=SHORT))
    assert isinstance(error, errors.RunnerExitedError)
    # An orderly exit answers its calls first.
    assert isinstance(first, errors.GenerationFailedError if code == 70 else type(error))
    assert error.exit_code == runner.exit_code == code
    assert words in error.exit_reason
    assert words in str(error)
    assert any(last_line in line for line in error.stderr_tail), error.stderr_tail
    assert error.last_memory_bytes == known > 2**20
    assert "MiB at its last status" in str(error)


async def test_the_client_reports_how_a_child_died_in_asyncio(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_engine(monkeypatch, breaking("import os; os.abort()"))
    async with AsyncRunnerProcess(stub) as runner:
        known = (await runner.status()).memory_usage.process_bytes
        with pytest.raises(errors.RunnerExitedError, match="SIGABRT") as caught:
            await runner.complete("def", options=SHORT, request_id=BREAK)
    assert caught.value.last_memory_bytes == known > 2**20


def test_a_death_before_any_status_reports_no_memory(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_engine(monkeypatch, "import os; os.abort()")
    with pytest.raises(errors.RunnerExitedError, match="SIGABRT") as caught:
        RunnerProcess(stub).load()
    assert caught.value.last_memory_bytes is None
    assert "at its last status" not in str(caught.value)


def test_a_death_during_a_load_reports_the_last_memory(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "from support.fakes import FakeBackend; FakeBackend.load = lambda *_: time.sleep(600)"
    use_fake_engine(monkeypatch, f"import time; {slow}")
    runner = RunnerProcess(stub)
    runner.load()
    try:
        seen: list[int] = []

        def kill(status: object) -> None:
            seen.append(status.memory_usage.process_bytes)  # type: ignore[attr-defined]  # a Status
            os.kill(pid_of(runner), signal.SIGKILL)

        with pytest.raises(errors.RunnerExitedError, match="OOM killer") as caught:
            runner.wait_until_running(kill)
        assert caught.value.last_memory_bytes in seen
    finally:
        runner.close()


def test_the_last_lines_are_only_those_of_the_dead_child(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of a sibling and of the previous child do not appear."""
    use_fake_engine(
        monkeypatch,
        "import os; print('I am', os.getpid(), file=sys.stderr, flush=True)\n"
        + breaking("import os; os.abort()"),
    )
    with RunnerProcess(stub) as one, RunnerProcess(stub) as two:
        pids = [pid_of(one), pid_of(two)]
        with in_threads(2) as pool:
            calls = [
                pool.submit(end_of, lambda r=runner: r.complete("x", request_id=BREAK))  # type: ignore[misc]
                for runner in (one, two)
            ]
            first, second = (call.result(20) for call in calls)
        one.restart()
        third = end_of(lambda: one.complete("x", request_id=BREAK))
        pids.append(pid_of(one))
    for error, pid in zip((first, second, third), pids, strict=True):
        assert isinstance(error, errors.RunnerExitedError)
        assert [line for line in error.stderr_tail if line.startswith("I am")] == [f"I am {pid}"]


SYS_EXIT_IN_A_HANDLER = """
from support import fakes
def leave(self, text, *, as_prompt, literal):
    sys.exit(3)
fakes.ByteCodec.encode = leave
"""


def test_a_sys_exit_in_a_handler_is_reported(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_engine(monkeypatch, SYS_EXIT_IN_A_HANDLER)
    with RunnerProcess(stub) as runner:
        began = time.monotonic()
        error = end_of(lambda: runner.complete("x"))
        wait_until(lambda: runner.has_exited, 20)
        assert time.monotonic() - began < 2 * PROMISED_SECONDS
        assert isinstance(error, errors.RunnerExitedError)
        assert "exit code 3" in str(error)


def test_a_child_killed_by_close_is_not_blamed_on_the_oom_killer(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    no_signals = "import runner_server.app as app; app.install_signals = lambda *_: None"
    use_fake_engine(monkeypatch, f"{no_signals}; {deaf}")
    runner = RunnerProcess(stub, timeouts=Timeouts(close_seconds=0.3))
    with runner:
        pass
    assert (
        ProcessView.of(runner).exit_reason
        == "killed by SIGKILL (signal 9), by this client: it did not stop in 0.3 s"
    )
