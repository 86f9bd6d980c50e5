"""Temporary runner of a command: checked, spawned, loaded with progress, and stopped."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.output import LoadProgress
from runner_client.errors import RunnerError
from runner_client.rpc.messages.responses import join_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner_client.process.process import RunnerProcess
    from runner_client.rpc.stream import CompletionStream
    from runner_client.types import Completion, LoadResult


@contextmanager
def loaded(runner: RunnerProcess, name: str) -> Iterator[LoadResult]:
    """Start a runner, show the progress of the load, and stop the runner after the block.

    Args:
        runner: The runner, not yet started.
        name: The model as named by the user.

    Raises:
        RunnerError: The model does not fit, or the runner did not start or load.
    """
    try:
        runner.load()
        with LoadProgress(name) as progress:
            result = runner.wait_until_running(on_progress=progress)
        yield result
    finally:
        runner.close()


def streamed(stream: CompletionStream, show: Callable[[str], None]) -> Completion:
    """Read a stream to the end, and show each piece of text on arrival.

    Raises:
        RunnerError: The completion failed.
    """
    chunks = []
    try:
        with stream:
            for chunk in stream:
                if chunk.content:
                    show(chunk.content)
                chunks.append(chunk)
    except RunnerError:
        if any(chunk.content for chunk in chunks):
            # The error message starts on a new line.
            show("\n")
        raise
    return join_chunks(chunks)


def show_text(content: str) -> None:
    """Print text without buffering or a newline."""
    click.echo(content, nl=False)


def show_nothing(content: str) -> None:
    """Ignore the text, for a command with JSON output."""
