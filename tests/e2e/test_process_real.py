"""RunnerProcess with the real server and a small model: every way to end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runner_client import (
    AsyncRunnerProcess,
    DoneReason,
    MemoryGate,
    Options,
    RunnerClient,
    RunnerProcess,
    State,
    Status,
    errors,
)
from support.fake_child import is_gone, wait_until
from support.faulty import hooked
from support.process_view import ProcessView

pytestmark = pytest.mark.mlx

LONG = Options(num_predict=100_000, temperature=2, top_k=0, top_p=1.0, logit_bias={0: -100})
"""A completion as long as the context, whose text repeats too little to be drafted."""

PARENT = """
import os, subprocess, sys, time
from runner_client import Options, RunnerProcess

runner = RunnerProcess({model!r}, context_length=32_000)
runner.load()
# A sibling that outlives this process, started while the pipe to the child is open.
sibling = {sibling}
{until}
print(runner.pid, sibling, flush=True)
{then}
time.sleep(600)
"""
SPAWNED = (
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " close_fds=False, stdout=2).pid"
)
FORKED = "os.fork() or (time.sleep(60), os._exit(0))"

LOADS_WHEN_STOPPED = """
import time
from runner_server.engine.thread import EngineThread
load = EngineThread._load

def waiting(self, command):
    while not (command.cancelled.is_set() or self._registry.is_stopping):
        time.sleep(0.01)
    return load(self, command)

EngineThread._load = waiting
"""
NOTHING_FREE = """
import dataclasses
from runner_common.host_memory import free

measure = free.free_memory
free.free_memory = lambda: dataclasses.replace(
    measure(), source="system", available_bytes=1, system_bytes=1
)
"""
"""Makes a server measure no free memory."""

WAIT = "runner.wait_until_running()\n"
GENERATE = (
    "options = Options(num_predict=100_000, temperature=2, top_k=0, logit_bias={0: -100})\n"
    "stream = runner.completion('x', options=options)\n"
    "next(stream)\n"
)
READ_ON = "for _ in stream: pass"


@pytest.fixture(scope="module")
def model(model_dir: Callable[..., Path]) -> str:
    """Build a model with room for a completion of a minute."""
    return str(model_dir(max_position_embeddings=32_000))


@pytest.fixture(scope="module")
def running(model: str) -> Iterator[RunnerProcess]:
    """Run one runner, shared by several tests."""
    with RunnerProcess(model, context_length=512, parallel=2) as runner:
        yield runner


def test_the_properties_agree_with_the_status(running: RunnerProcess, model: str) -> None:
    status = running.status()
    assert status.state is State.ACTIVE
    assert status.pid == running.pid
    assert status.parallel == 2
    assert running.model_path == model
    assert running.context_length == status.context_length == 512
    assert running.memory_size == status.memory_bytes > 0
    assert running.device_infos[0].memory_bytes == running.memory_size
    assert status.model is not None
    assert status.model.architecture == "llama"
    assert running.ping() < 1


def test_the_figures_of_a_completion_agree(running: RunnerProcess) -> None:
    options = Options(num_predict=12, temperature=0)
    completion = running.complete("The quick", options=options, logprobs=2)
    assert completion.done_reason in (DoneReason.LENGTH, DoneReason.STOP)
    assert completion.eval_count == len(completion.token_ids) == len(completion.logprobs) <= 12
    assert all(len(logprob.top) == 2 for logprob in completion.logprobs)
    assert completion.prompt_eval_count == len(running.tokenize("The quick"))
    assert completion.eval_seconds > 0
    stream = running.completion("The quick", options=options)
    assert "".join(chunk.content for chunk in stream) == completion.content


def test_tokenize_and_detokenize_are_inverses(running: RunnerProcess) -> None:
    text = "na\u00efve \u65e5\u672c\u8a9e \U0001f600"
    assert running.detokenize(running.tokenize(text)) == text


def test_an_invalid_request_names_its_field(running: RunnerProcess) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        running.complete("Hi", options=Options(temperature=-1))
    assert [field for field, _ in caught.value.field_violations] == ["options.temperature"]


def test_a_prompt_that_is_too_long_reports_its_length(running: RunnerProcess) -> None:
    with pytest.raises(errors.PromptTooLongError) as caught:
        running.complete([1] * 600)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (600, 512)


def test_another_client_with_the_token_may_call(running: RunnerProcess) -> None:
    assert running.address is not None
    with RunnerClient(running.address, token=running.token) as client:
        assert client.is_serving("mlxrunner.v1.RunnerService")
        assert client.status().pid == running.pid


@pytest.mark.parametrize("token", [None, "x" * 43])
def test_a_client_without_the_token_is_refused(running: RunnerProcess, token: str | None) -> None:
    """Another user may find the port, but does not have the token."""
    assert running.address is not None
    with RunnerClient(running.address, token=token) as client:
        assert client.is_serving()
        calls: list[Callable[[], object]] = [
            client.status,
            client.unload,
            lambda: client.load("m"),
            lambda: client.complete("x"),
            lambda: client.tokenize("x"),
            lambda: client.detokenize([1]),
        ]
        for call in calls:
            with pytest.raises(errors.AuthenticationError):
                call()
    assert running.status().state is State.ACTIVE


def test_the_token_is_hidden_from_other_users(running: RunnerProcess) -> None:
    assert running.token
    assert len(running.token) >= 43
    child = psutil.Process(running.pid)
    assert not any(running.token in argument for argument in child.cmdline())
    view = ProcessView.of(running)
    assert not any(running.token in line for line in view.stderr_tail)
    known = repr(running) + repr(running.status()) + repr(view.plan)
    assert running.token not in known


def test_leaving_a_stream_frees_its_slot(model: str) -> None:
    with RunnerProcess(model, context_length=32_000, parallel=1) as runner:
        for _ in runner.completion("x", options=LONG):
            break
        assert runner.complete("y", options=Options(num_predict=1)).eval_count == 1


def test_over_a_unix_socket(model: str) -> None:
    with RunnerProcess(model, listen="unix") as runner:
        assert runner.port is None
        assert runner.address is not None
        path = Path(runner.address.removeprefix("unix:"))
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert path.parent.stat().st_mode & 0o077 == 0
        assert runner.complete("Hi", options=Options(num_predict=1)).eval_count == 1
    assert not path.parent.exists()


def test_close_stops_the_server_in_order(model: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runner_client")
    with RunnerProcess(model) as runner:
        pass
    assert runner.exit_code == 0
    assert "stopping on SIGINT" in caplog.text


def test_a_kill_mid_stream_is_reported_within_a_second(model: str) -> None:
    with RunnerProcess(model, context_length=32_000) as runner:
        stream = runner.completion("x", options=LONG)
        next(stream)
        assert runner.pid is not None
        begin = time.monotonic()
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(errors.RunnerExitedError, match="SIGKILL") as caught:
            list(stream)
        assert time.monotonic() - begin < 1
    assert caught.value.exit_code == -signal.SIGKILL
    assert any("listening on" in line for line in caught.value.stderr_tail)


async def test_a_kill_mid_stream_is_reported_within_a_second_in_asyncio(model: str) -> None:
    async with AsyncRunnerProcess(model, context_length=32_000) as runner:
        stream = runner.completion("x", options=LONG)
        await anext(stream)
        assert runner.pid is not None
        begin = time.monotonic()
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
            async for _ in stream:
                pass
        assert time.monotonic() - begin < 1


async def test_concurrent_streams_in_asyncio_get_equal_tokens(model: str) -> None:
    options = Options(num_predict=16, temperature=0)
    async with AsyncRunnerProcess(model, parallel=4) as runner:
        completions = await asyncio.gather(
            *(runner.complete("The quick", options=options) for _ in range(8))
        )
        assert len({completion.token_ids for completion in completions}) == 1
        assert runner.context_length > 0


def test_close_ends_a_load(model: str, tmp_path: Path) -> None:
    seen: list[Status] = []
    ends: list[BaseException] = []
    # The load ends only with the runner, however late the waiting thread starts.
    runner = RunnerProcess(model, env=hooked(tmp_path, LOADS_WHEN_STOPPED))
    runner.load()

    def wait() -> None:
        try:
            runner.wait_until_running(seen.append)
        except errors.RunnerError as error:
            ends.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: any(status.state is State.LOADING for status in seen))
    begin = time.monotonic()
    runner.close()
    assert runner.has_exited
    waiter.join(10)
    assert len(ends) == 1
    assert time.monotonic() - begin < 8


def test_an_overridden_gate_overrides_the_server_too(model: str, tmp_path: Path) -> None:
    environment = hooked(tmp_path, NOTHING_FREE)
    with pytest.raises(errors.InsufficientMemoryError, match="are available"):
        RunnerProcess(model, env=environment).__enter__()
    gate = MemoryGate(minimum_bytes=2**62, settle_seconds=0)
    runner = RunnerProcess(model, gate=gate, env=environment, memory_override=True)
    with runner:
        assert runner.complete("Hi", options=Options(num_predict=1)).eval_count == 1


def test_restart_after_a_crash_starts_a_new_runner(model: str) -> None:
    with RunnerProcess(model) as runner:
        first, runner_id = runner.pid, runner.status().runner_id
        assert first is not None
        codes = [runner.exit_code]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: runner.has_exited)
        codes.append(runner.exit_code)
        runner.restart()
        assert runner.pid != first
        assert runner.status().runner_id != runner_id
    codes.append(runner.exit_code)
    assert codes == [None, -signal.SIGKILL, 0]


def test_a_child_outlives_the_thread_that_started_it(model: str) -> None:
    runner = RunnerProcess(model)
    thread = threading.Thread(target=runner.load)
    thread.start()
    thread.join()
    try:
        runner.wait_until_running()
        assert runner.complete("Hi", options=Options(num_predict=1)).eval_count == 1
    finally:
        runner.close()


@contextmanager
def parent(
    model: str, until: str, then: str = "", sibling: str = SPAWNED
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a program with a runner; yield the program and the pid of the runner."""
    script = PARENT.format(model=model, until=until, then=then, sibling=sibling)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        child, sibling_pid = map(int, process.stdout.readline().split())
        try:
            yield process, child
        finally:
            os.kill(sibling_pid, signal.SIGKILL)
            process.kill()
            if not is_gone(child):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("until", "then"),
    [(WAIT, ""), ("", ""), (WAIT + GENERATE, READ_ON)],
    ids=["idle", "loading", "generating"],
)
def test_a_killed_parent_ends_its_child(model: str, until: str, then: str) -> None:
    with parent(model, until, then) as (process, child):
        assert not is_gone(child)
        process.kill()
        process.wait()
        assert wait_until(lambda: is_gone(child)) < 2


def test_a_fork_that_holds_the_pipe_does_not_keep_the_child_alive(model: str) -> None:
    with parent(model, WAIT, sibling=FORKED) as (process, child):
        process.kill()
        process.wait()
        assert wait_until(lambda: is_gone(child)) < 2


def test_an_interrupted_parent_ends_its_child(model: str) -> None:
    with parent(model, WAIT) as (process, child):
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert wait_until(lambda: is_gone(child)) < 2


def test_a_host_that_ignores_interrupts_can_stop_its_child(model: str) -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit this."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with RunnerProcess(model) as runner:
            pass
        assert runner.exit_code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unsupported_model_starts_no_child(tmp_path: Path, model: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(model).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "no_such_type", "hidden_size": 64}')
    runner = RunnerProcess(str(broken))
    with pytest.raises(errors.ModelUnsupportedError, match="no_such_type"):
        runner.__enter__()
    assert runner.pid is None
