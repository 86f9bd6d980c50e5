"""The checks of RunnerProcess before a start, and the start of the child."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerProcess, MemoryGate, RunnerProcess, errors
from runner_client.host import command
from runner_client.host.probe import run_probe
from runner_common.contract import TOKEN_VARIABLE, USE_TOKEN_VARIABLE
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.need_query import NeedRequest, NeedUnknownError, ask_need, can_ask
from support.fake_child import use_fake_child, use_script, write_model
from support.process_view import ProcessView


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch)


def free(available_bytes: int) -> Callable[[], FreeMemory]:
    return lambda: FreeMemory(
        available_bytes=available_bytes,
        source="system",
        system_bytes=available_bytes,
        cgroup_bytes=None,
        device_bytes=None,
        device_name="test",
        device_kind="cpu",
    )


def load_request_of(runner: RunnerProcess) -> str:
    """Return the load request of a closed fake child, as printed to stderr on exit."""
    return ProcessView.of(runner).stderr_tail[0]


@pytest.mark.usefixtures("fake_child")
def test_the_load_request_matches_the_gates_estimate(model: str) -> None:
    with RunnerProcess(model, dtype="bfloat16") as runner:
        pass
    expected = pb.LoadRequest(model=model, context_length=128, parallel=4, dtype=pb.DTYPE_BFLOAT16)
    assert load_request_of(runner) == repr(str(expected))


@pytest.mark.usefixtures("fake_child")
@pytest.mark.parametrize("asked", [None, 0, 2**20])
def test_the_prefix_cache_is_estimated_and_requested(model: str, asked: int | None) -> None:
    with RunnerProcess(model, prefix_cache_bytes=asked) as runner:
        assert runner.estimate is not None
        assert runner.estimate.has_default_prefix_cache == (asked is None)
        if asked is not None:
            assert runner.estimate.prefix_cache_bytes == asked
    request = load_request_of(runner)
    assert (f"prefix_cache_bytes: {asked}" in request) == (asked is not None)
    assert ("prefix_cache_bytes" in request) == (asked is not None)


@pytest.mark.usefixtures("fake_child")
def test_a_prefix_cache_that_does_not_fit_starts_nothing(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    with pytest.raises(errors.InsufficientMemoryError, match=r"prefix cache \(1.0 GiB\)"):
        RunnerProcess(model, gate=gate, prefix_cache_bytes=2**30).load()


@pytest.mark.usefixtures("fake_child")
def test_the_blas_can_be_chosen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def child_environment(base: dict[str, str], *, backend: str, blas: str) -> dict[str, str]:
        assert backend
        asked.append(blas)
        return dict(base)

    monkeypatch.setattr("runner_client.process.launch.child_environment", child_environment)
    with RunnerProcess(model), RunnerProcess(model, blas="off"):
        pass
    assert asked == ["auto", "off"]


@pytest.mark.usefixtures("fake_child")
def test_a_close_during_the_gate_starts_nothing(model: str) -> None:
    def close_first() -> FreeMemory:
        runner.close()
        return free(2**40)()

    runner = RunnerProcess(model, gate=MemoryGate(measure=close_first))
    with pytest.raises(errors.RunnerUnavailableError, match="closed while it was starting"):
        runner.load()
    assert runner.pid is None


@pytest.mark.usefixtures("fake_child")
def test_a_model_that_does_not_fit_starts_nothing(model: str) -> None:
    gate = MemoryGate(measure=free(2**20), settle_seconds=0)
    runner = RunnerProcess(model, gate=gate)
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        runner.load()
    assert type(caught.value) is errors.InsufficientMemoryError
    assert runner.pid is None
    with pytest.raises(errors.LoadRequiresFullError):
        RunnerProcess(model, gate=gate, require_full=True).load()
    with RunnerProcess(model, gate=gate, memory_override=True) as forced:
        assert forced.complete("Hi").content == "Hello world"


def test_a_missing_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        RunnerProcess(str(tmp_path / "none")).load()


def test_a_platform_without_mlx_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    with pytest.raises(errors.UnsupportedPlatformError, match="Windows AMD64"):
        RunnerProcess(model).load()


@pytest.mark.parametrize("missing", ["runner_server", "mlx", "mlx_lm"])
def test_a_python_without_the_servers_packages_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(errors.NotSupportedError, match=rf"no .*{missing}.*the extra cpu"):
        RunnerProcess(model).load()


def test_a_python_without_a_known_executable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(errors.RunnerUnavailableError, match=r"sys\.executable"):
        command.server_command("127.0.0.1:0")


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pose as a frozen program; return the log file of program starts."""
    program, starts = tmp_path / "MyApp", tmp_path / "starts"
    program.write_text(f'#!/bin/sh\necho "$@" >>{starts}\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr("sys.frozen", True, raising=False)
    return starts


def test_a_frozen_program_does_not_start_itself(model: str, frozen: Path) -> None:
    with pytest.raises(errors.RunnerUnavailableError, match=r"this program is frozen.*MyApp"):
        RunnerProcess(model).load()
    assert not frozen.exists()


def test_a_frozen_program_estimates_and_probes_without_starting_itself(
    model: str, frozen: Path
) -> None:
    assert not can_ask()
    with pytest.raises(NeedUnknownError, match="frozen"):
        ask_need(NeedRequest(model), {"XDG_CACHE_HOME": str(frozen.parent)})
    assert "frozen" in run_probe({}).failure
    assert not frozen.exists()


@pytest.mark.usefixtures("fake_child")
def test_the_child_gets_the_environment_and_the_working_directory(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(
        monkeypatch,
        "import os, sys; sys.exit(os.environ['MINE'] + os.environ['THEIRS'] + os.getcwd())",
    )
    monkeypatch.setenv("THEIRS", "b")
    with pytest.raises(errors.RunnerExitedError) as caught:
        RunnerProcess(model, env={"MINE": "a"}).load()
    assert caught.value.stderr_tail == (f"ab{Path.cwd()}",)


@pytest.mark.usefixtures("fake_child")
def test_an_unknown_kind_of_address_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="pigeon"):
        RunnerProcess(model, listen="pigeon").load()  # type: ignore[arg-type]  # the point


def test_the_socket_is_in_a_private_folder_with_a_short_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    socket = command.ListenAddress.make("unix")
    assert socket.folder is not None
    assert socket.folder.stat().st_mode & 0o777 == 0o700
    assert len(socket.argument.removeprefix("unix:")) <= 103
    assert list(deep.iterdir()) == []
    socket.remove()
    socket.remove()
    assert not socket.folder.exists()


@pytest.mark.parametrize("given", [None, "/mine"])
def test_the_import_paths_of_a_child_are_left_to_the_caller(
    model: str, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    use_fake_child(monkeypatch, "print(os.environ.get('PYTHONPATH'), file=sys.stderr)")
    with RunnerProcess(model, env={"PYTHONPATH": given} if given else None) as runner:
        pass
    assert load_request_of(runner) == str(given)


@pytest.mark.parametrize("given", [{}, {TOKEN_VARIABLE: "the host's own"}])
def test_each_child_gets_a_new_token(
    model: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    """The token is in the environment, which other users cannot read, and never in argv."""
    use_fake_child(
        monkeypatch,
        "import os, sys\n"
        f"print(os.environ[{TOKEN_VARIABLE!r}], file=sys.stderr)\n"
        "print(sys.argv, file=sys.stderr)",
    )
    seen: list[str | None] = []
    runner = RunnerProcess(model, env=given)
    assert runner.token is None
    for _ in range(2):
        with runner:
            seen.append(runner.token)
        token, argv, *_ = ProcessView.of(runner).stderr_tail
        assert token == seen[-1]
        assert token not in argv
        assert len(token) >= 43
        assert token not in repr(runner) + repr(vars(runner))
    assert len(set(seen)) == 2


@pytest.mark.usefixtures("fake_child")
async def test_each_child_gets_a_new_token_in_asyncio(model: str) -> None:
    runner = AsyncRunnerProcess(model)
    seen: list[str | None] = []
    for _ in range(2):
        async with runner:
            seen.append(runner.token)
    assert None not in seen
    assert len(set(seen)) == 2


@pytest.mark.parametrize("given", [None, "of-the-program-itself"])
def test_a_token_for_use_is_given_but_not_inherited(
    model: str, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    use_fake_child(monkeypatch, f"print(os.environ.get({USE_TOKEN_VARIABLE!r}), file=sys.stderr)")
    monkeypatch.setenv(USE_TOKEN_VARIABLE, "of-this-process-0123")
    with RunnerProcess(model, env={USE_TOKEN_VARIABLE: given} if given else None) as runner:
        pass
    assert load_request_of(runner) == str(given)
