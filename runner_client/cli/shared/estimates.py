"""Verdicts on estimates, and their rows and JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Protocol

from runner_client.memory.gate import GateDecision, MemoryGate
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Any

    from runner_client.cli.shared.output import Row
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.types import Dtype, LoadEstimate, LoadOptions
    from runner_common.host_memory.free import FreeMemory

_LIMITS = {"system": "the system", "cgroup": "the control group", "device": "the device"}


class Estimator(Protocol):
    """Function that estimates one model."""

    def __call__(self, dtype: Dtype) -> MemoryEstimate:
        """Estimate with the weights held in a format."""
        ...


def judge(estimator: Estimator, load: LoadOptions) -> tuple[MemoryEstimate, GateDecision | None]:
    """Estimate a model and decide whether it fits this machine now.

    Returns:
        The estimate, as stored if ``load`` allows that and nothing else fits, and the gate's
        decision; None in place of it for an estimate for another backend.
    """
    need = estimator(load.dtype)
    decision = _decide(need)
    if decision is None or decision.fits or load.dtype not in ("auto", "auto_or_stored"):
        return need, decision
    stored = estimator("as_stored")
    if load.dtype == "auto":
        return _with_way_out(need, stored), decision
    return _as_stored_if_that_fits(need, decision, stored)


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


def verdict_values(need: MemoryEstimate, decision: GateDecision | None) -> dict[str, Any]:
    """Return an estimate and a decision for JSON."""
    return {
        "fits": decision and decision.fits,
        "estimate": {
            **asdict(need),
            "total_bytes": need.total_bytes,
            "required_bytes": need.required_bytes,
        },
        "decision": decision and asdict(decision),
    }


def verdict_rows(need: MemoryEstimate, decision: GateDecision | None) -> list[Row]:
    """Return the rows of an estimate, the free memory and the verdict."""
    return [
        *_need_rows(need),
        *(_decision_rows(decision) if decision else _not_compared(need)),
        *(("note", note) for note in need.notes),
    ]


def _need_rows(need: MemoryEstimate) -> list[Row]:
    return [
        ("model", need.path),
        ("held", f"{held_text(need)}, on {need.backend}"),
        ("context", context_text(need)),
        ("files", figure(need.file_bytes)),
        *part_rows(need.parts, need),
    ]


def held_text(need: MemoryEstimate | LoadEstimate) -> str:
    """Describe the format of the weights."""
    return "as stored" if need.dtype == "as_stored" else f"as {need.dtype}"


def context_text(need: MemoryEstimate | LoadEstimate) -> str:
    """Describe the lengths and number of the sequences counted."""
    return f"{need.context_length:,} tokens, {need.parallel} completions together"


def part_rows(parts: dict[str, int], need: MemoryEstimate | LoadEstimate) -> list[Row]:
    """Return the rows of the parts of a need and their sum."""
    return [
        *((name, figure(size)) for name, size in parts.items()),
        ("needed", figure(need.total_bytes)),
        *([("at least", _at_least(need))] if need.required_bytes < need.total_bytes else []),
    ]


def _at_least(need: MemoryEstimate | LoadEstimate) -> str:
    return f"{figure(need.required_bytes)}  the prefix cache shrinks if memory is short"


def fits_text(decision: GateDecision | LoadEstimate) -> str:
    """Say whether the model fits, and by how much."""
    spare = decision.available_bytes - decision.required_bytes
    return (
        f"yes, {format_bytes(spare)} to spare"
        if decision.fits
        else f"no, {format_bytes(-spare)} short; lower --context-length or --parallel, choose "
        "a smaller --dtype or model, or stop another process"
    )


def _decision_rows(decision: GateDecision) -> list[Row]:
    return [
        ("free", f"{figure(decision.free.available_bytes)}  {_limits(decision.free)}"),
        ("kept free", figure(decision.overhead_bytes)),
        *([("reserved", _reserved(decision))] if decision.reserved_bytes else []),
        ("available", figure(decision.available_bytes)),
        ("fits", fits_text(decision)),
    ]


def _reserved(decision: GateDecision) -> str:
    count = decision.reserved_count
    others = "1 other runner" if count == 1 else f"{count} other runners"
    return f"{figure(decision.reserved_bytes)}  that {others} may still take"


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


def figure(count: int) -> str:
    """Format a number of bytes right-aligned."""
    return f"{format_bytes(count):>10}"
