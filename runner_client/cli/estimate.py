"""``mlx-runner estimate``: memory needed by a model, free memory, and whether the model fits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, get_args

import click

from runner_client.cli.shared.access import Credentials, access_options, address_option, open_client
from runner_client.cli.shared.errors import EXIT_CODES, EXIT_TOO_LARGE
from runner_client.cli.shared.options import (
    json_option,
    load_options,
)
from runner_client.cli.shared.output import Row, print_json, print_rows
from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_client.memory.gate import GateDecision, MemoryGate
from runner_common.host_memory.free import Backend
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.types import LoadEstimate, LoadOptions
    from runner_common.host_memory.free import FreeMemory

_LIMITS = {"system": "the system", "cgroup": "the control group", "device": "the device"}


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
    need = estimate(model, options=load, backend=backend)
    decision = _decide(need)
    if decision is not None and not decision.fits and load.dtype in ("auto", "auto_or_stored"):
        stored = estimate(model, options=load, backend=backend, dtype="as_stored")
        if load.dtype == "auto":
            need = _with_way_out(need, stored)
        else:
            need, decision = _as_stored_if_that_fits(need, decision, stored)
    _show(need, decision, as_json=as_json)
    return decision is None or decision.fits


def _decide(need: MemoryEstimate) -> GateDecision | None:
    """Return the gate's decision; None if the estimate is for another backend."""
    decision = MemoryGate().check(need, override=True)
    return decision if decision.free.device_kind == need.backend else None


def _with_way_out(need: MemoryEstimate, stored: MemoryEstimate) -> MemoryEstimate:
    """Add a note on the stored format to an estimate too large as float32, if stored fits."""
    decision = _decide(stored)
    if decision is None or not decision.fits:
        return need
    note = (
        f"as stored it needs {format_bytes(stored.required_bytes)}, which fits: use --dtype "
        "auto_or_stored or as_stored, but it is many times slower on a CPU"
    )
    return replace(need, notes=(*need.notes, note))


def _as_stored_if_that_fits(
    need: MemoryEstimate, decision: GateDecision, stored: MemoryEstimate
) -> tuple[MemoryEstimate, GateDecision]:
    """Return the estimate and decision as stored if fitting, otherwise the given pair."""
    stored_decision = _decide(stored)
    if stored_decision is None or not stored_decision.fits:
        return need, decision
    note = (
        f"as {need.dtype} it needs {format_bytes(need.required_bytes)}, which does not fit; "
        "a runner holds it as stored, which is slow on a CPU"
    )
    return replace(stored, notes=(*stored.notes, note)), stored_decision


def _show(need: MemoryEstimate, decision: GateDecision | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "fits": decision and decision.fits,
                "estimate": {
                    **asdict(need),
                    "total_bytes": need.total_bytes,
                    "required_bytes": need.required_bytes,
                },
                "decision": decision and asdict(decision),
            }
        )
        return
    rows = [*_need_rows(need), *(_decision_rows(decision) if decision else _not_compared(need))]
    print_rows([*rows, *(("note", note) for note in need.notes)])


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
        ("held", _held(answer)),
        ("context", _context(answer)),
        *_part_rows(parts, answer),
        ("kept free", _figure(answer.overhead_bytes)),
        ("reserved", f"{_figure(answer.reserved_bytes)}  that other runners may still take"),
        ("available", _figure(answer.available_bytes)),
        ("fits", _verdict(answer)),
    ]
    print_rows([*rows, *(("note", note) for note in answer.notes)])


def _need_rows(need: MemoryEstimate) -> list[Row]:
    return [
        ("model", need.path),
        ("held", f"{_held(need)}, on {need.backend}"),
        ("context", _context(need)),
        ("files", _figure(need.file_bytes)),
        *_part_rows(need.parts, need),
    ]


def _held(need: MemoryEstimate | LoadEstimate) -> str:
    return "as stored" if need.dtype == "as_stored" else f"as {need.dtype}"


def _context(need: MemoryEstimate | LoadEstimate) -> str:
    return f"{need.context_length:,} tokens, {need.parallel} completions together"


def _part_rows(parts: dict[str, int], need: MemoryEstimate | LoadEstimate) -> list[Row]:
    return [
        *((name, _figure(size)) for name, size in parts.items()),
        ("needed", _figure(need.total_bytes)),
        *([("at least", _at_least(need))] if need.required_bytes < need.total_bytes else []),
    ]


def _at_least(need: MemoryEstimate | LoadEstimate) -> str:
    return f"{_figure(need.required_bytes)}  the prefix cache shrinks if memory is short"


def _verdict(decision: GateDecision | LoadEstimate) -> str:
    spare = decision.available_bytes - decision.required_bytes
    return (
        f"yes, {format_bytes(spare)} to spare"
        if decision.fits
        else f"no, {format_bytes(-spare)} short; lower --context-length or --parallel, choose "
        "a smaller --dtype or model, or stop another process"
    )


def _decision_rows(decision: GateDecision) -> list[Row]:
    return [
        ("free", f"{_figure(decision.free.available_bytes)}  {_limits(decision.free)}"),
        ("kept free", _figure(decision.overhead_bytes)),
        *([("reserved", _reserved(decision))] if decision.reserved_bytes else []),
        ("available", _figure(decision.available_bytes)),
        ("fits", _verdict(decision)),
    ]


def _reserved(decision: GateDecision) -> str:
    count = decision.reserved_count
    others = "1 other runner" if count == 1 else f"{count} other runners"
    return f"{_figure(decision.reserved_bytes)}  that {others} may still take"


def _not_compared(need: MemoryEstimate) -> list[Row]:
    return [("fits", f"not compared: this machine's MLX does not run on {need.backend}")]


def _limits(free: FreeMemory) -> str:
    """Describe which limit applies, and the values of the others."""
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
