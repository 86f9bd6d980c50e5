"""Load from other processes on this machine during a measurement."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

_LEAST_CORES = 0.25
"""Missing cores that make a measurement doubtful: an eighth of a machine with two cores, about
the variation between two measurements that ``blas_measure`` allows for."""

_WITHIN_USER = ("guest", "guest_nice")
"""Fields of ``psutil.cpu_times`` that the field ``user`` includes (Linux)."""


@dataclass(frozen=True, slots=True)
class CpuClock:
    """Processor time used since some moment in the past.

    Attributes:
        wall_seconds: Elapsed time.
        busy_seconds: Time of all cores of the machine, except for idle time.
        own_seconds: Time of this process and of its children that have been waited for.
        cores: Cores of the machine.
    """

    wall_seconds: float
    busy_seconds: float
    own_seconds: float
    cores: int


def cpu_clock() -> CpuClock:
    """Return the processor time used so far."""
    times = psutil.cpu_times()._asdict()
    idle = times.get("idle", 0.0) + times.get("iowait", 0.0)
    busy = sum(times.values()) - idle - sum(times.get(name, 0.0) for name in _WITHIN_USER)
    own = os.times()
    own_seconds = own.user + own.system + own.children_user + own.children_system
    return CpuClock(time.monotonic(), busy, own_seconds, psutil.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class OtherLoad:
    """Load of other processes between two readings of the clock.

    Attributes:
        busy_cores: Cores that other processes kept busy, on average.
        cores: Cores of the machine.
    """

    busy_cores: float
    cores: int

    @classmethod
    def between(cls, before: CpuClock, after: CpuClock) -> OtherLoad:
        """Return the load between two readings."""
        own = after.own_seconds - before.own_seconds
        others = after.busy_seconds - before.busy_seconds - own
        wall = after.wall_seconds - before.wall_seconds
        return cls(max(0.0, others / wall) if wall > 0 else 0.0, after.cores)

    def disturbs(self, cores: int) -> bool:
        """Return whether the other load left fewer than ``cores`` cores, by more than noise."""
        return self.cores - self.busy_cores < min(cores, self.cores) - _LEAST_CORES
