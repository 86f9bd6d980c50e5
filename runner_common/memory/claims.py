"""Comparison of a need with free memory and claims, shared by gate and server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_common.host_memory.free import is_in_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner_common.host_memory.free import FreeMemory, MemoryLimit
    from runner_common.memory.headroom import Headroom


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of comparing a need with available memory, with the numbers used.

    Attributes:
        fits: Whether the need is at most the available memory.
        required_bytes: The need.
        available_bytes: Free memory less overhead and reservations, never negative.
        overhead_bytes: Memory kept free: the device's minimum and the configured overhead.
        reserved_bytes: Memory that other runners may still take.
        free: The measurement.
    """

    fits: bool
    required_bytes: int
    available_bytes: int
    overhead_bytes: int
    reserved_bytes: int
    free: FreeMemory


def decide(
    required_bytes: int, free: FreeMemory, headroom: Headroom, claimed_bytes: int
) -> Decision:
    """Compare a need with free memory, less headroom and the claims of other runners."""
    rest = free.available_bytes - headroom.total_bytes - claimed_bytes
    return Decision(
        fits=required_bytes <= max(0, rest),
        required_bytes=required_bytes,
        available_bytes=max(0, rest),
        overhead_bytes=headroom.total_bytes,
        reserved_bytes=claimed_bytes,
        free=free,
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory one process may still take.

    Attributes:
        pid: The process.
        claimed_bytes: Size of the claim.
        device: Id of the discrete GPU with the memory; empty for the system's memory.
    """

    pid: int
    claimed_bytes: int
    device: str = ""


def claimed_of(free: FreeMemory, claims: Sequence[Claim]) -> tuple[int, int]:
    """Return the bytes by which claims reduce the free memory, and the number of claims counted.

    A claim reduces only the limits that it falls under: not that of another GPU, nor that of a
    control group without the claiming process.
    """
    limits = free.limits
    bounded = [[claim for claim in claims if _is_within(claim, limit)] for limit in limits]
    rests = [
        limit.available_bytes - sum(claim.claimed_bytes for claim in within)
        for limit, within in zip(limits, bounded, strict=True)
    ]
    least = min(rests)
    available_bytes = min(limit.available_bytes for limit in limits)
    return available_bytes - least, len(bounded[rests.index(least)])


def _is_within(claim: Claim, limit: MemoryLimit) -> bool:
    if claim.device != limit.device:
        return False
    return not limit.group or is_in_group(claim.pid, limit.group)
