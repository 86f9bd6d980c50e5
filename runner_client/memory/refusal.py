"""Message of a refusal by the gate: the figures, and only advice that can help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_common.memory.headroom import MINIMUM_VARIABLE, OVERHEAD_VARIABLE, usual_minimum
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import GateDecision
    from runner_common.memory.headroom import Headroom

_LIMITED_BY = {
    "system": "the system's memory",
    "cgroup": "the control group",
    "device": "the device",
}


def refusal_text(estimate: MemoryEstimate, decision: GateDecision, headroom: Headroom) -> str:
    """Describe a model that does not fit: its need, the available memory, and what to do."""
    parts = dict(estimate.parts)
    if not _counted_cache_bytes(estimate):
        del parts["prefix cache"]
    part, part_bytes = max(parts.items(), key=lambda item: item[1])
    *first, last = _advice(estimate, decision, headroom)
    advice = f"{', '.join(first)}, or {last}"
    return (
        f"{estimate.model} requires {format_bytes(decision.required_bytes)}, most of it "
        f"{part} ({format_bytes(part_bytes)}), but only {format_bytes(decision.available_bytes)} "
        f"are available: {format_bytes(decision.free.available_bytes)} free on "
        f"{decision.free.device_name} (limited by {_LIMITED_BY[decision.free.source]}), less "
        f"{format_bytes(decision.overhead_bytes)} overhead{_reserved_text(decision)}. "
        f"{advice[0].upper()}{advice[1:]}"
    )


def _advice(estimate: MemoryEstimate, decision: GateDecision, headroom: Headroom) -> Iterator[str]:
    """Yield what would make the model fit, the most likely cause first."""
    if variable := _excessive_variable(decision, headroom):
        yield variable
    yield f"stop another {'runner or process' if decision.reserved_bytes else 'process'}"
    if smaller := _smaller(estimate, decision.available_bytes):
        yield f"lower {' or '.join(smaller)}"
    if decision.available_bytes:
        yield "use a smaller model"
    yield "override the gate with memory_override"


def _excessive_variable(decision: GateDecision, headroom: Headroom) -> str | None:
    """Return advice on variables without which the model would fit; None if there are none."""
    free_bytes = decision.free.available_bytes - decision.reserved_bytes
    usual = usual_minimum(decision.free.device_kind)
    if free_bytes - headroom.minimum_bytes >= decision.required_bytes:
        return f"lower {OVERHEAD_VARIABLE} ({format_bytes(headroom.overhead_bytes)})"
    if headroom.minimum_bytes <= usual:
        return None
    if free_bytes - usual - headroom.overhead_bytes >= decision.required_bytes:
        return f"lower {MINIMUM_VARIABLE} ({format_bytes(headroom.minimum_bytes)})"
    if free_bytes - usual >= decision.required_bytes:
        return f"lower {OVERHEAD_VARIABLE} and {MINIMUM_VARIABLE}"
    return None


def _smaller(estimate: MemoryEstimate, available_bytes: int) -> list[str]:
    """Return the options whose reduction can make the model fit."""
    cache_bytes = _counted_cache_bytes(estimate)
    without_cache = estimate.required_bytes - cache_bytes
    fixed_bytes = estimate.weight_bytes + estimate.process_bytes + estimate.load_transient_bytes
    smaller = []
    if cache_bytes and fixed_bytes <= available_bytes:
        smaller.append("prefix_cache_bytes")
    # A context has at least two tokens.
    if fixed_bytes < available_bytes and without_cache > fixed_bytes:
        smaller.append(f"context_length ({estimate.context_length})")
        if estimate.parallel > 1:
            smaller.append(f"parallel ({estimate.parallel})")
    return smaller


def _counted_cache_bytes(estimate: MemoryEstimate) -> int:
    """Return the size of an explicitly requested prefix cache; a default one shrinks by itself."""
    return 0 if estimate.has_default_prefix_cache else estimate.prefix_cache_bytes


def _reserved_text(decision: GateDecision) -> str:
    if not decision.reserved_bytes:
        return ""
    others = (
        "1 other runner"
        if decision.reserved_count == 1
        else (f"{decision.reserved_count} other runners")
    )
    return f" and {format_bytes(decision.reserved_bytes)} that {others} may still take"
