"""``mlx-runner estimate``: memory needed by a model, free memory, and whether the model fits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, get_args

import click

from runner_client.cli.shared.access import Credentials, access_options, address_option, open_client
from runner_client.cli.shared.errors import EXIT_CODES, EXIT_TOO_LARGE
from runner_client.cli.shared.estimates import (
    context_text,
    figure,
    fits_text,
    held_text,
    judge,
    part_rows,
    verdict_rows,
    verdict_values,
)
from runner_client.cli.shared.options import (
    json_option,
    load_options,
)
from runner_client.cli.shared.output import print_json, print_rows
from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_common.host_memory.free import Backend

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.types import Dtype, LoadEstimate, LoadOptions


@click.command(
    "estimate",
    short_help="Estimate the memory of a model, and whether it fits.",
    epilog=EXIT_CODES,
)
@click.argument("model")
@load_options(
    "context_length", "parallel", "dtype", "allow_inexact", "kv_bits", "adapters", "draft_model"
)
@click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    help="Backend to run on; free memory is only compared for that of this machine.  "
    "[default: this machine's]",
)
@address_option("Ask the runner at this address")
@access_options
@json_option
def command(
    model: str,
    *,
    address: str | None,
    load: LoadOptions,
    backend: Backend | None,
    as_json: bool,
    **credentials: Unpack[Credentials],
) -> None:
    """Estimate the memory that MODEL needs, part by part, and whether it fits now.

    MODEL is a directory, or a hub id (org/name) in the local Hugging Face cache. No weights are
    read, and no runner is started. With --address, a running runner estimates for its own
    machine, and MODEL is one of that machine. A model that
    cannot be compared with this machine's free memory counts as fitting.
    """
    if address is None:
        if any(credentials.values()):
            raise click.UsageError("--token-file and --tls-... need --address")
        fits = _count(model, load, backend, as_json=as_json)
    else:
        if backend:
            raise click.UsageError("--backend cannot be used with --address")
        with open_client(address, **credentials) as client:
            answer = client.estimate(model, options=load)
        _show_answer(model, answer, as_json=as_json)
        fits = answer.fits
    if not fits:
        raise click.exceptions.Exit(EXIT_TOO_LARGE)


def _count(model: str, load: LoadOptions, backend: Backend | None, *, as_json: bool) -> bool:
    """Estimate on this machine and print the result; return False if the model does not fit.

    The result is True if the model fits, or if that cannot be compared here.
    """

    def estimated(dtype: Dtype) -> MemoryEstimate:
        return estimate(model, options=load, backend=backend, dtype=dtype)

    need, decision = judge(estimated, load)
    if as_json:
        print_json(verdict_values(need, decision))
    else:
        print_rows(verdict_rows(need, decision))
    return decision is None or decision.fits


def _show_answer(model: str, answer: LoadEstimate, *, as_json: bool) -> None:
    if as_json:
        print_json({"fits": answer.fits, "estimate": asdict(answer)})
        return
    parts = {
        "weights": answer.weight_bytes,
        "KV cache": answer.kv_bytes,
        "prefix cache": answer.prefix_cache_bytes,
        "working memory": answer.working_bytes,
        "process": answer.process_bytes,
        "load transient": answer.load_transient_bytes,
    }
    rows = [
        ("model", model),
        ("held", held_text(answer)),
        ("context", context_text(answer)),
        *part_rows(parts, answer),
        ("kept free", figure(answer.overhead_bytes)),
        ("reserved", f"{figure(answer.reserved_bytes)}  that other runners may still take"),
        ("available", figure(answer.available_bytes)),
        ("fits", fits_text(answer)),
    ]
    print_rows([*rows, *(("note", note) for note in answer.notes)])
