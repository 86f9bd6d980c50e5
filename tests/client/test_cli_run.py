"""Commands with a runner of their own (run, tokenize, demo), on a fake runner."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import psutil
import pytest

from runner_client import RunnerClient
from runner_client.cli import demo, run, tokenize
from runner_client.cli.shared.output import completion_rows
from runner_client.errors import InsufficientMemoryError, RunnerTimeoutError
from runner_client.host import doctor
from runner_client.testing import Failure, fake_runner
from runner_client.types import Completion, DoneReason, LoadOptions
from support.command_line import invoke

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner_client.rpc.stream import CompletionStream
    from runner_client.testing import FakeRunner
    from runner_client.types import LoadResult, Status


class FakeProcess(RunnerClient):
    """Subset of RunnerProcess used by the commands, on top of the fake runner."""

    completion_failure: Failure | None = None
    estimate: Any = None

    def __init__(self, fake: FakeRunner, model: str, **settings: object) -> None:
        super().__init__(fake.address)
        self.fake = fake
        self.model = model
        self.settings = settings
        self.pid = os.getpid()
        self.has_exited = False
        self.exit_code: int | None = None

    def load(self) -> None:  # type: ignore[override]  # a process loads its own model
        """Start nothing: the fake runner is already up."""

    def wait_until_running(self, on_progress: Callable[[Status], None]) -> LoadResult:
        """Load the model into the fake runner."""
        options: Any = self.settings.get("options")
        return super().load(self.model, options=options, on_progress=on_progress)

    def completion(self, *args: Any, **kwargs: Any) -> CompletionStream:
        """Stream a completion, which fails with ``completion_failure`` if one is set."""
        self.fake.failure = self.completion_failure
        return super().completion(*args, **kwargs)

    def close(self) -> None:
        """Record the exit and close the client."""
        self.has_exited, self.exit_code = True, 0
        super().close()


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    with fake_runner(pieces=("Hello", " wörld")) as runner:
        yield runner


@pytest.fixture
def started(fake: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """Return the processes started by commands."""
    processes: list[FakeProcess] = []

    def start(model: str, **settings: object) -> FakeProcess:
        processes.append(FakeProcess(fake, model, **settings))
        return processes[-1]

    for module in (run, tokenize, demo):
        monkeypatch.setattr(module, "RunnerProcess", start)
    return processes


def test_text_goes_to_stdout_and_figures_to_stderr(started: list[FakeProcess]) -> None:
    result = invoke("run", "a/model", "Hi")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello wörld\n"
    assert result.stderr.startswith("loading a/model\n")
    assert "generated  2 tokens, ended by stop" in result.stderr
    assert started[0].has_exited


def test_a_fallback_to_the_stored_format_is_reported(
    fake: FakeRunner, started: list[FakeProcess]
) -> None:
    assert "held" not in invoke("run", "m", "Hi").stderr
    fake.dtype_fallback = True
    result = invoke("run", "m", "Hi", "--dtype", "auto_or_stored")
    assert "held       as stored, which is slow on a CPU" in result.stderr
    assert started[-1].settings["options"] == LoadOptions(dtype="auto_or_stored")
    assert json.loads(invoke("run", "m", "Hi", "--json").stdout)["model"]["dtype_fallback"]


def test_every_option_reaches_the_runner(fake: FakeRunner, started: list[FakeProcess]) -> None:
    floats = {
        "temperature": 0.5,
        "top_p": 0.75,
        "min_p": 0.25,
        "repeat_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
    }
    integers = {"top_k": 5, "repeat_last_n": -1, "num_predict": 7, "seed": -(2**63)}
    arguments = ["run", "m", "Hi", "--stop", "\n\n", "--stop", "-", "--context-length", "99"]
    for name, value in {**floats, **integers}.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    arguments += ["--dtype", "bfloat16", "--prefix-cache", "64MiB", "--allow-inexact"]
    arguments += ["--kv-bits", "4"]
    assert invoke(*arguments).exit_code == 0
    options = fake.requests[-1].options  # type: ignore[attr-defined]  # a completion's request
    for name, value in {**floats, **integers}.items():
        assert getattr(options, name) == value, name
    assert list(options.stop) == ["\n\n", "-"]
    load = LoadOptions(
        context_length=99,
        dtype="bfloat16",
        prefix_cache_bytes=64 * 2**20,
        allow_inexact=True,
        kv_bits=4,
    )
    assert started[0].settings == {"options": load, "parallel": 1}


def test_an_adapter_is_a_directory_of_the_runner_that_is_started(
    fake: FakeRunner, started: list[FakeProcess]
) -> None:
    assert invoke("run", "m", "Hi", "--adapter", "/adapters/sql").exit_code == 0
    expected = LoadOptions(adapters={"adapter": "/adapters/sql"})
    assert started[0].settings == {"options": expected, "parallel": 1}
    assert fake.requests[-1].adapter == "adapter"  # type: ignore[attr-defined]  # as above


def test_an_adapter_is_a_name_of_the_runner_at_an_address(fake: FakeRunner) -> None:
    fake.adapters = {"sql": "/adapters/sql"}
    assert invoke("run", "--address", fake.address, "Hi", "--adapter", "sql").exit_code == 0
    assert fake.requests[-1].adapter == "sql"  # type: ignore[attr-defined]  # as above
    result = invoke("run", "--address", fake.address, "Hi", "--adapter", "fr")
    assert result.exit_code == 2
    assert result.stderr.endswith("error: --adapter: the loaded model has no adapter 'fr'\n")


def test_options_not_given_are_left_to_the_server(
    fake: FakeRunner, started: list[FakeProcess]
) -> None:
    invoke("run", "m", "Hi")
    assert len(started) == 1
    options = fake.requests[-1].options  # type: ignore[attr-defined]  # a completion's request
    assert options.ListFields() == []


def test_a_dash_reads_the_prompt_from_standard_input(
    fake: FakeRunner, started: list[FakeProcess]
) -> None:
    assert invoke("run", "m", "-", given="line\nläst").exit_code == 0
    assert len(started) == 1
    assert fake.requests[-1].prompt == "line\nläst"  # type: ignore[attr-defined]  # a completion's


def test_cached_prompt_tokens_do_not_count_in_the_rate() -> None:
    completion = Completion("", (), (), DoneReason.STOP, None, 1200, 0.5, 2, 0.1, 0.0, 1000)
    rows = dict(completion_rows(completion))
    assert rows["prompt"] == "1,200 tokens (1,000 from the prefix cache), 400.0 tokens/s"


def test_json_is_one_object_and_nothing_else(fake: FakeRunner, started: list[FakeProcess]) -> None:
    fake.prompt_cached_count = 3
    result = invoke("run", "m", "Hi", "--json")
    record = json.loads(result.stdout)
    assert record["content"] == "Hello wörld"
    assert record["token_ids"] == [0, 1]
    assert record["done_reason"] == "stop"
    assert record["prompt_cached_count"] == 3
    assert record["model"]["name"] == "m"
    assert record["load_seconds"] >= 0
    assert started[0].has_exited


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_failure_mid_stream_ends_the_runner(
    monkeypatch: pytest.MonkeyPatch,
    fake: FakeRunner,
    started: list[FakeProcess],
    more: tuple[str, ...],
) -> None:
    fake.fail_after = 1
    monkeypatch.setattr(
        FakeProcess, "completion_failure", Failure("GENERATION_FAILED", "MLX raised; retry")
    )
    result = invoke("run", "m", "Hi", *more)
    assert result.exit_code == 1
    assert result.stdout == ("" if more else "Hello\n")
    assert "error: MLX raised; retry" in result.stderr
    assert started[0].has_exited


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InsufficientMemoryError("needs 9.0 GiB, 4.0 GiB are free"), 3),
        (RunnerTimeoutError("no ready line within 60 s", phase="start"), 1),
    ],
)
def test_a_failed_start_is_reported(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeProcess], error: Exception, code: int
) -> None:
    monkeypatch.setattr(FakeProcess, "load", Mock(side_effect=error))
    result = invoke("run", "m", "Hi")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert started[0].has_exited


def test_an_interrupt_while_streaming_stops_the_runner(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeProcess]
) -> None:
    monkeypatch.setattr(run, "show_text", Mock(side_effect=KeyboardInterrupt))
    result = invoke("run", "m", "Hi")
    assert result.exit_code == 130
    assert result.stderr.endswith("\ninterrupted\n")
    assert started[0].has_exited


def test_tokenize_with_a_model_starts_a_runner(started: list[FakeProcess]) -> None:
    result = invoke("tokenize", "--model", "m", "ab")
    assert result.exit_code == 0, result.output
    assert result.stdout == "97 98\n"
    assert started[0].model == "m"
    assert started[0].has_exited


def test_demo_reports_every_phase(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeProcess]
) -> None:
    monkeypatch.setattr(psutil, "pid_exists", {os.getpid(): False}.__getitem__)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert f"{demo.PROMPT}Hello wörld\n" in result.stdout
    assert "has exited and is reaped (exit code 0)" in result.stdout
    for word in ("model", "runner", "load", "prompt", "generated", "memory", "stopped", "free"):
        assert any(line.startswith(word) for line in result.stdout.splitlines()), word
    assert started[0].model == str(demo.demo_model())
    assert started[0].has_exited


def test_demo_reports_a_process_that_does_not_exit(started: list[FakeProcess]) -> None:
    result = invoke("demo")
    assert result.exit_code == 1
    assert f"process {os.getpid()} still exists" in result.stderr
    assert len(started) == 1


def test_demo_without_the_server_package(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeProcess]
) -> None:
    monkeypatch.setattr(demo, "package_folders", {"runner_server": ()}.__getitem__)
    result = invoke("demo")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the demo model is missing")
    assert started == []


def test_the_demo_model_is_found_without_importing_the_server() -> None:
    assert (demo.demo_model() / "model.safetensors").is_file()
    assert importlib.util.find_spec("runner_server") is not None


def test_demo_suggests_packages_that_would_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    started: list[FakeProcess],  # noqa: ARG001 - puts the fake in place
) -> None:
    monkeypatch.setattr(psutil, "pid_exists", lambda _pid: False)
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cpu")
    monkeypatch.setattr(doctor, "find_blas", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert "apt-get install libopenblas0-pthread" in result.stdout
    assert "apt-get install g++" in result.stdout
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cuda")
    assert "apt-get install" not in invoke("demo").stdout
