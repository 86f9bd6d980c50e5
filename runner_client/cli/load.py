"""``mlx-runner load``: load a model into a running runner."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_argument,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import (
    json_option,
    load_options,
    text,
)
from runner_client.cli.shared.output import LoadProgress, Row, model_rows, print_json, print_rows
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.types import LoadOptions, LoadResult


@click.command("load", short_help="Load a model into a running runner.", epilog=EXIT_CODES)
@address_argument
@click.argument("model", type=text)
@load_options()
@access_options
@json_option
def command(
    address: str,
    model: str,
    *,
    load: LoadOptions,
    as_json: bool,
    **credentials: Unpack[Credentials],
) -> None:
    """Load MODEL into the runner at ADDRESS, in place of the model loaded there.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path. MODEL is a directory on the runner's machine,
    or a hub id (org/name) in its local cache; the runner looks up a relative path in its own
    working directory, so give an absolute one. The runner ends running completions first. Ctrl-C
    cancels the load.

    A model that is not found, that the runner cannot build, or that does not fit the memory is
    refused while the loaded model stays. One that fails later, while its weights are read for
    example, leaves the runner without a model.
    """
    if not model:
        raise click.BadArgumentUsage("MODEL is empty")
    with open_client(address, **credentials) as client, LoadProgress(model) as progress:
        result = client.load(model, options=load, on_progress=progress)
    if as_json:
        print_json(asdict(result))
    else:
        print_rows(_rows(result))


def _rows(result: LoadResult) -> list[Row]:
    model = result.model
    parts = (model.architecture, model.dtype, format_bytes(model.weight_bytes))
    return [
        ("model", f"{model.name} ({', '.join(part for part in parts if part)})"),
        ("load", f"{result.load_seconds:.2f} s"),
        *model_rows(model),
    ]
