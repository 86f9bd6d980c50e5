"""A runner of the command's own: gated, spawned, loaded with progress, and stopped."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from runner_client.cli.output import LoadProgress
from runner_client.errors import RunnerError
from runner_client.rpc.messages import join_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner_client.process.process import RunnerProcess
    from runner_client.rpc.stream import CompletionStream
    from runner_client.types import Completion, LoadResult


@contextmanager
def loaded(runner: RunnerProcess, name: str) -> Iterator[LoadResult]:
    """Starts a runner, waits for its model with progress shown, and stops it in the end.

    Args:
        runner: Not yet started.
        name: What the person calls its model.

    Raises:
        RunnerError: It does not fit, or did not start or load.
    """
    try:
        runner.load()
        with LoadProgress(name) as progress:
            result = runner.wait_until_running(on_progress=progress)
        yield result
    finally:
        runner.close()


def streamed(stream: CompletionStream, show: Callable[[str], None]) -> Completion:
    """Reads a stream to its end and shows each piece of text as it comes.

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
        # What is told next begins on a line of its own.
        show("\n")
        raise
    return join_chunks(chunks)


def show_text(content: str) -> None:
    """Prints a piece of text at once."""
    click.echo(content, nl=False)


def show_nothing(content: str) -> None:
    """For a command whose output is one JSON object."""
