"""``mlx-runner``: the command line."""

from __future__ import annotations

import io
import os
import sys

import click

from runner_client.cli import (
    chat,
    demo,
    doctor,
    load,
    run,
    serve,
    status,
    stop,
    tokenize,
    trim,
    unload,
)
from runner_client.cli.models import estimate, pull
from runner_client.cli.pools import pool, ps
from runner_client.cli.shared.errors import EXIT_CODES, Commands

__all__ = ["main"]


@click.group(
    "mlx-runner",
    cls=Commands,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="mlx-grpc-runner")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run MLX language models in separate processes, called over gRPC."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        ctx.color = False
    for stream in (sys.stdout, sys.stderr):
        # Replace characters that the terminal cannot show instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


for module in (
    demo,
    doctor,
    estimate,
    pull,
    run,
    chat,
    serve,
    load,
    unload,
    stop,
    status,
    tokenize,
    trim,
    pool,
    ps,
):
    main.add_command(module.command)
