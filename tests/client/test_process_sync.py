"""RunnerProcess with a fake runner as the child."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from runner_client import (
    RestartPolicy,
    RunnerProcess,
    State,
    Status,
    Timeouts,
    errors,
)
from support.fake_child import (
    is_gone,
    open_files,
    use_fake_child,
    use_script,
    wait_until,
    write_model,
)
from support.process_view import ProcessView

SLOW_LOAD = "runner.load_seconds = 600"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch)


@pytest.mark.usefixtures("fake_child")
def test_the_context_manager_starts_and_stops_the_child(model: str) -> None:
    runner = RunnerProcess(model)
    assert (runner.pid, runner.port, runner.address) == (None, None, None)
    assert (runner.context_length, runner.memory_size) == (0, 0)
    assert runner.device_infos == ()
    with runner:
        pid = runner.pid
        assert pid is not None
        assert runner.address == f"127.0.0.1:{runner.port}"
        assert runner.model_path == model
        assert runner.complete("Hi").content == "Hello world"
        assert [chunk.content for chunk in runner.completion("Hi")] == ["Hello", " world", ""]
        assert runner.detokenize(runner.tokenize("h\u00e9")) == "h\u00e9"
        assert runner.trim(prefix_cache_bytes=0) == 0
        assert runner.ping() > 0
        assert runner.status().pid == pid
        with pytest.raises(errors.NotSupportedError):
            runner.embedding("x")
    assert runner.has_exited
    assert is_gone(pid)
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        runner.status()


@pytest.mark.usefixtures("fake_child")
def test_load_wait_and_close_can_be_called_separately(model: str) -> None:
    runner = RunnerProcess(model, context_length=64, parallel=2)
    try:
        need = runner.load()
        assert (need.context_length, need.parallel) == (64, 2)
        assert runner.estimate is need
        result = runner.wait_until_running()
        assert result.model.path == model
        assert runner.wait_until_running().model == result.model
    finally:
        runner.close()
        runner.close()


def test_calls_before_the_start_say_what_to_do(model: str) -> None:
    runner = RunnerProcess(model)
    for call in (runner.status, runner.ping, runner.wait_until_running):
        with pytest.raises(errors.RunnerUnavailableError, match=r"call load\(\) first"):
            call()
    runner.close()


@pytest.mark.usefixtures("fake_child")
def test_a_second_load_is_refused_and_leaves_the_first_running(model: str) -> None:
    with RunnerProcess(model) as runner:
        with pytest.raises(errors.RunnerUnavailableError, match="already started"):
            runner.load()
        assert runner.complete("Hi").content == "Hello world"


@pytest.mark.usefixtures("fake_child")
def test_a_runner_can_load_again_after_close(model: str) -> None:
    runner = RunnerProcess(model)
    with runner:
        first = runner.pid
    with runner:
        assert runner.pid != first
        assert runner.complete("Hi").content == "Hello world"


def test_a_load_reports_its_progress(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.load_seconds = 1.0")
    seen: list[Status] = []
    runner = RunnerProcess(model)
    try:
        runner.load()
        runner.wait_until_running(seen.append)
    finally:
        runner.close()
    assert State.LOADING in {status.state for status in seen}


def test_a_stalled_load_times_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.load_seconds = math.inf")
    runner = RunnerProcess(model, timeouts=Timeouts(load_seconds=0.5))
    with pytest.raises(errors.RunnerTimeoutError, match="no progress"):
        runner.__enter__()
    assert runner.has_exited


def test_a_failing_load_ends_the_child(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.failure = Failure('MODEL_UNSUPPORTED', 'no such layer')")
    runner = RunnerProcess(model)
    with pytest.raises(errors.ModelUnsupportedError, match="no such layer"):
        runner.__enter__()
    assert runner.has_exited


def test_a_child_that_dies_while_loading_is_reported_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = RunnerProcess(model)
    runner.load()
    threading.Timer(0.3, os.kill, (runner.pid, signal.SIGKILL)).start()
    begin = time.monotonic()
    with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
        runner.wait_until_running()
    assert time.monotonic() - begin < 0.3 + 1
    runner.close()


def test_a_killed_child_ends_every_pending_call(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "runner.stall_after = 1\nprint('last words', file=sys.stderr)")
    ends: list[tuple[type[BaseException], str, float]] = []

    with RunnerProcess(model) as runner:
        streams = [runner.completion("Hi") for _ in range(4)]
        for stream in streams:
            next(stream)

        def read(stream: object) -> None:
            try:
                next(stream)  # type: ignore[call-overload]  # a stream
            except errors.RunnerError as error:
                ends.append((type(error), str(error), time.monotonic()))

        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        assert runner.pid is not None
        killed_at = time.monotonic()
        os.kill(runner.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(10)
        wait_until(lambda: runner.has_exited, 1)
        with pytest.raises(errors.RunnerExitedError):
            runner.status()
    assert {kind for kind, _, _ in ends} == {errors.RunnerExitedError}
    assert len(ends) == 4
    assert all(ended_at - killed_at < 1 for _, _, ended_at in ends)
    assert "killed by SIGKILL (signal 9)" in ends[0][1]
    assert "last words" in ends[0][1]


def test_an_exit_before_the_ready_line_is_reported(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import sys; sys.exit('no such device')")
    runner = RunnerProcess(model)
    with pytest.raises(errors.RunnerExitedError, match="no such device") as caught:
        runner.load()
    assert caught.value.exit_code == 1
    assert runner.has_exited


def test_a_child_that_never_gets_ready_times_out(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import time; time.sleep(600)")
    runner = RunnerProcess(model, timeouts=Timeouts(start_seconds=0.3, close_seconds=5))
    with pytest.raises(errors.RunnerTimeoutError) as caught:
        runner.load()
    assert caught.value.phase == "start"
    assert runner.has_exited


def test_a_ready_child_that_does_not_serve_times_out(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = "print('1|1|tcp|127.0.0.1:1|grpc', flush=True); import time; time.sleep(600)"
    use_script(monkeypatch, ready)
    runner = RunnerProcess(model, timeouts=Timeouts(start_seconds=4, close_seconds=5))
    with pytest.raises(errors.RunnerTimeoutError, match="did not report SERVING") as caught:
        runner.load()
    assert caught.value.phase == "start"
    assert runner.has_exited


def test_close_from_another_thread_ends_a_load(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = RunnerProcess(model)
    runner.load()
    threading.Timer(0.2, runner.close).start()
    with pytest.raises(errors.RunnerError):
        runner.wait_until_running()
    runner.close()
    assert runner.has_exited


def test_close_from_another_thread_ends_a_start(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import time; time.sleep(600)")
    runner = RunnerProcess(model)

    def close_when_started() -> None:
        wait_until(lambda: runner.pid is not None)
        runner.close()

    closer = threading.Thread(target=close_when_started)
    closer.start()
    with pytest.raises(errors.RunnerUnavailableError, match="closed while it was starting"):
        runner.load()
    closer.join()
    assert runner.has_exited


@pytest.mark.usefixtures("fake_child")
def test_an_exception_in_the_block_ends_the_child(model: str) -> None:
    runner = RunnerProcess(model)
    with pytest.raises(KeyboardInterrupt), runner:
        raise KeyboardInterrupt
    assert runner.has_exited


def test_an_interrupt_while_loading_ends_the_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = RunnerProcess(model)
    # Python drops an interrupt that arrives while a channel of an earlier test is collected.
    gc.collect()

    def interrupt() -> None:
        wait_until(lambda: runner.port is not None)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.__enter__()
    thread.join()
    assert runner.has_exited


@pytest.mark.usefixtures("fake_child")
def test_a_process_has_a_client_for_every_call(model: str) -> None:
    runner = RunnerProcess(model)
    with pytest.raises(errors.RunnerUnavailableError, match=r"call load\(\) first"):
        _ = runner.client
    with runner:
        first = runner.client
        assert first is runner.client
        assert (first.complete("Hi")).content == "Hello world"
        assert (first.unload()) == 0
        assert (first.load(model)).model.path == model
        runner.restart()
        assert runner.client is not first
        assert (runner.client.status()).pid == runner.pid
        with pytest.raises(errors.RunnerUnavailableError):
            first.status()


@pytest.mark.usefixtures("fake_child")
def test_restart_starts_a_new_process(model: str) -> None:
    with RunnerProcess(model, restart_policy=RestartPolicy(max_restarts=2)) as runner:
        pids = [runner.pid]
        for _ in range(2):
            assert runner.pid is not None
            os.kill(runner.pid, signal.SIGKILL)
            with pytest.raises(errors.RunnerExitedError):
                runner.complete("Hi")
            runner.restart()
            pids.append(runner.pid)
            assert runner.complete("Hi").content == "Hello world"
        assert len(set(pids)) == 3
        with pytest.raises(errors.RunnerUnavailableError, match="restarted 2 times"):
            runner.restart()


@pytest.mark.usefixtures("fake_child")
def test_the_child_of_a_discarded_runner_exits(model: str) -> None:
    runner = RunnerProcess(model)
    runner.load()
    runner.wait_until_running()
    child = ProcessView.of(runner).child
    del runner
    gc.collect()
    wait_until(lambda: child.has_exited)
    child.close(1)


@pytest.mark.usefixtures("fake_child")
def test_no_descriptors_or_threads_are_left_open(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner_client.rpc.transport.watchdog._LINGER_SECONDS", 0.05)
    with RunnerProcess(model):
        pass
    gc.collect()
    before, threads = open_files(), threading.active_count()
    for _ in range(3):
        with RunnerProcess(model) as runner:
            runner.complete("Hi")
    del runner
    gc.collect()
    # gRPC closes sockets on threads of its own.
    wait_until(lambda: open_files() <= before)
    wait_until(lambda: threading.active_count() <= threads)


@pytest.mark.usefixtures("fake_child")
def test_the_arguments_of_completions_reach_the_child(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "runner_client")
    with RunnerProcess(model) as runner:
        runner.complete("Hi", request_id="one", priority=7)
        assert list(runner.completion("Hi", request_id="two", priority=-8))
    # The child prints its requests when it stops.
    for request_id, priority in (("one", 7), ("two", -8)):
        assert f'request_id: "{request_id}"\\npriority: {priority}\\n' in caplog.text


@pytest.mark.usefixtures("fake_child")
def test_a_load_logs_its_estimate_beside_the_peak(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "runner_client")
    with RunnerProcess(model):
        pass
    assert "estimated" in caplog.text
