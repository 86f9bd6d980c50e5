"""``mlx-runner run``: one completion in a temporary runner."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from runner_client.cli.errors import EXIT_CODES
from runner_client.cli.options import (
    allow_inexact_option,
    context_length_option,
    dtype_option,
    json_option,
    prefix_cache_option,
    sampling_options,
    text_or_stdin,
)
from runner_client.cli.output import completion_rows, model_rows, print_json, print_rows
from runner_client.cli.session import loaded, show_nothing, show_text, streamed
from runner_client.process.process import RunnerProcess
from runner_client.types import Options

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.cli.options import Sampling
    from runner_client.types import Completion, Dtype, LoadResult


@click.command(
    "run", short_help="Complete a prompt with a model, in a temporary runner.", epilog=EXIT_CODES
)
@click.argument("model")
@click.argument("prompt", type=text_or_stdin)
@sampling_options
@context_length_option
@dtype_option
@prefix_cache_option
@click.option("--memory-override", is_flag=True, help="Start the model even if it does not fit.")
@allow_inexact_option
@json_option
def command(
    model: str,
    prompt: str,
    *,
    context_length: int | None,
    dtype: Dtype,
    prefix_cache: int | None,
    memory_override: bool,
    allow_inexact: bool,
    as_json: bool,
    **sampling: Unpack[Sampling],
) -> None:
    """Complete PROMPT with MODEL, in a runner started for this and stopped afterwards.

    MODEL is a directory, or a hub id (org/name) in the local Hugging Face cache; nothing is
    downloaded. PROMPT is used as is, without a chat template; - reads it from standard input. The
    text goes to standard output as it is generated, everything else to standard error.
    """
    if not prompt:
        raise click.BadArgumentUsage("PROMPT is empty")
    runner = RunnerProcess(
        model,
        context_length=context_length,
        parallel=1,
        dtype=dtype,
        prefix_cache_bytes=prefix_cache,
        memory_override=memory_override,
        allow_inexact=allow_inexact,
    )
    with loaded(runner, model) as load:
        stream = runner.completion(prompt, options=Options(**sampling))
        completion = streamed(stream, show_nothing if as_json else show_text)
    if as_json:
        print_json(_record(load, completion))
        return
    click.echo()
    rows = [*completion_rows(completion), ("load", f"{load.load_seconds:.2f} s")]
    print_rows([*rows, *model_rows(load.model)], err=True)


def _record(load: LoadResult, completion: Completion) -> dict[str, object]:
    """Return the output of ``--json``: the fields of ``Completion`` and ``LoadResult``."""
    return {**asdict(load), **asdict(completion)}
