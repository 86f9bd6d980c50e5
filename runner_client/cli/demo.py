"""``mlx-runner demo``: the life of a runner from start to stop, with the bundled model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import psutil

from runner_client.cli.shared.errors import EXIT_CODES, Failure
from runner_client.cli.shared.output import Row, completion_rows, model_rows, print_rows
from runner_client.cli.shared.session import loaded, show_text, streamed
from runner_client.cli.status import memory_text
from runner_client.host import doctor
from runner_client.host.environment import package_folders
from runner_client.process.process import RunnerProcess
from runner_client.types import Options
from runner_common.host_memory.free import free_memory
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from runner_client.types import LoadResult, Status

PROMPT = "def read_file(path):"
"""Prompt for the demo model, which is trained on Python's standard library."""

OPTIONS = Options(temperature=0, num_predict=128, stop=("\n\n\n",))
"""Greedy decoding up to the end of the function: the same text on every run."""


@click.command(
    "demo", short_help="Start, use and stop a runner with the embedded model.", epilog=EXIT_CODES
)
def command() -> None:
    """Start a runner with the bundled demo model, stream a completion, and stop the runner.

    Shows the steps of every use: check that the model fits, start a process, load, stream a
    completion, stop the process and get its memory back.
    """
    model = demo_model()
    before = free_memory().available_bytes
    runner = RunnerProcess(str(model), parallel=1, dtype="auto_or_stored")
    with loaded(runner, "the demo model") as load:
        status = runner.status()
        print_rows(_start_rows(runner, load, status, before))
        click.echo(f"\n{click.style(PROMPT, bold=True)}", nl=False)
        completion = streamed(runner.completion(PROMPT, options=OPTIONS), show_text)
        click.echo("\n")
        status = runner.status()
        during = free_memory().available_bytes
    rows = [
        *completion_rows(completion),
        ("memory", memory_text(status.memory_usage)),
        ("stopped", _stopped(runner, status)),
        ("free", _free(before, during, free_memory().available_bytes)),
    ]
    print_rows([*rows, *(("faster", advice) for advice in doctor.missing())])


def demo_model() -> Path:
    """Return the directory of the model bundled with the server, without importing the server.

    Raises:
        Failure: The model is missing.
    """
    for folder in package_folders("runner_server"):
        model = folder / "demo" / "model"
        if (model / "config.json").is_file():
            return model
    raise Failure(
        "the demo model is missing: this installation of mlx-grpc-runner has no "
        "runner_server/demo/model; reinstall it"
    )


def _start_rows(
    runner: RunnerProcess, load: LoadResult, status: Status, free_bytes: int
) -> list[Row]:
    model, need = load.model, runner.estimate
    rows = [
        ("model", f"{model.architecture}, {format_bytes(model.weight_bytes)} as {model.dtype}"),
        ("runner", f"process {runner.pid} at {runner.address} on {status.device}"),
        ("load", f"{load.load_seconds:.2f} s"),
    ]
    if need is not None:
        fits = f"needs {format_bytes(need.total_bytes)}, {format_bytes(free_bytes)} free"
        rows.insert(1, ("gate", fits))
    return [*rows, *model_rows(model)]


def _stopped(runner: RunnerProcess, status: Status) -> str:
    """Describe the end of the process.

    Raises:
        Failure: The process still exists.
    """
    if not runner.has_exited or psutil.pid_exists(status.pid):
        raise Failure(f"process {status.pid} still exists after the stop")
    held = format_bytes(status.memory_usage.process_bytes)
    return (
        f"process {status.pid} has exited and is reaped (exit code {runner.exit_code}), and its "
        f"{held} are free again"
    )


def _free(before: int, during: int, after: int) -> str:
    """Describe free memory over time, which includes changes by other processes."""
    return (
        f"{format_bytes(before)} before, {format_bytes(during)} with the runner, "
        f"{format_bytes(after)} now (including changes of other processes)"
    )
