"""``mlx-runner estimate``: what a model needs, what is free, and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, get_args

import click

from mlxrunner.hostmemory import Backend
from mlxrunner.units import format_bytes
from runner_client.cli._options import (
    context_length_option,
    dtype_option,
    json_option,
    parallel_option,
)
from runner_client.cli._output import Row, print_json, print_rows
from runner_client.estimate import DEFAULT_PARALLEL, MemoryEstimate, estimate
from runner_client.gate import GateDecision, MemoryGate

if TYPE_CHECKING:
    from mlxrunner.hostmemory import FreeMemory
    from runner_client.types import Dtype

EXIT_TOO_LARGE = 3

_LIMITS = {"system": "the system", "cgroup": "the control group", "device": "the device"}


@click.command(
    "estimate",
    short_help="Tell what a model needs in memory, and whether it fits.",
    epilog="Exit codes: 0 success (it fits, or was not compared), 1 failure (one line on standard "
    "error), 2 wrong usage, 3 it does not fit, 130 interrupted.",
)
@click.argument("model")
@context_length_option
@parallel_option(DEFAULT_PARALLEL)
@dtype_option
@click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    help="What it is to run on; free memory is compared only with that of this machine's.  "
    "[default: this machine's]",
)
@json_option
def command(
    model: str,
    *,
    context_length: int | None,
    parallel: int,
    dtype: Dtype,
    backend: Backend | None,
    as_json: bool,
) -> None:
    """Tell what MODEL needs in memory, part by part, and whether it fits now.

    MODEL is a directory, or a hub id (org/name) in the local Hugging Face cache. Only the headers
    of its files are read; nothing is loaded or started.
    """

    def need_as(dtype: Dtype) -> MemoryEstimate:
        return estimate(
            model, context_length=context_length, parallel=parallel, dtype=dtype, backend=backend
        )

    need = need_as(dtype)
    decision = _decide(need)
    if decision is not None and not decision.fits and dtype == "auto":
        need, decision = _as_stored_if_that_fits(need, decision, need_as("as_stored"))
    _show(need, decision, as_json=as_json)
    if decision is not None and not decision.fits:
        raise click.exceptions.Exit(EXIT_TOO_LARGE)


def _decide(need: MemoryEstimate) -> GateDecision | None:
    """What the gate would say; None if the need is that of another kind of machine."""
    decision = MemoryGate().check(need, override=True)
    return decision if decision.free.device_kind == need.backend else None


def _as_stored_if_that_fits(
    need: MemoryEstimate, decision: GateDecision, stored: MemoryEstimate
) -> tuple[MemoryEstimate, GateDecision]:
    """What a runner does with "auto" where float32 is too large."""
    stored_decision = _decide(stored)
    if stored_decision is None or not stored_decision.fits:
        return need, decision
    note = (
        f"as {need.dtype} it needs {format_bytes(need.total_bytes)}, which does not fit; "
        "a runner holds it as stored, which is slow on a CPU"
    )
    return replace(stored, notes=(*stored.notes, note)), stored_decision


def _show(need: MemoryEstimate, decision: GateDecision | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "fits": decision and decision.fits,
                "estimate": {**asdict(need), "total_bytes": need.total_bytes},
                "decision": decision and asdict(decision),
            }
        )
        return
    rows = [*_need_rows(need), *(_decision_rows(decision) if decision else _not_compared(need))]
    print_rows([*rows, *(("note", note) for note in need.notes)])


def _need_rows(need: MemoryEstimate) -> list[Row]:
    held = "as stored" if need.dtype == "as_stored" else f"as {need.dtype}"
    return [
        ("model", need.path),
        ("held", f"{held}, on {need.backend}"),
        ("context", f"{need.context_length:,} tokens, {need.parallel} completions together"),
        ("files", _figure(need.file_bytes)),
        *((name, _figure(size)) for name, size in need.parts.items()),
        ("needed", _figure(need.total_bytes)),
    ]


def _decision_rows(decision: GateDecision) -> list[Row]:
    spare = decision.available_bytes - decision.required_bytes
    verdict = (
        f"yes, {format_bytes(spare)} to spare"
        if decision.fits
        else f"no, {format_bytes(-spare)} too little; lower --context-length or --parallel, choose "
        "a smaller --dtype or model, or stop another process"
    )
    return [
        ("free", f"{_figure(decision.free.available_bytes)}  {_limits(decision.free)}"),
        ("kept back", _figure(decision.overhead_bytes)),
        ("available", _figure(decision.available_bytes)),
        ("fits", verdict),
    ]


def _not_compared(need: MemoryEstimate) -> list[Row]:
    return [("fits", f"not compared: this machine's MLX does not run on {need.backend}")]


def _limits(free: FreeMemory) -> str:
    """Which limit binds, and what the others would allow."""
    figures = {
        "system": free.system_bytes,
        "cgroup": free.cgroup_bytes,
        "device": free.device_bytes,
    }
    others = [
        f"{_LIMITS[name]} {format_bytes(size)}"
        for name, size in figures.items()
        if size is not None and name != free.source
    ]
    text = f"limited by {_LIMITS[free.source]}"
    return f"{text} ({', '.join(others)})" if others else text


def _figure(count: int) -> str:
    return f"{format_bytes(count):>10}"
