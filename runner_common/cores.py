"""How many processor cores a process may use at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner_common.host_memory.control_groups import control_groups, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores of this process.

    Attributes:
        count: How many it may use at once, at least 1.
        schedulable: Those that the scheduler may run it on, which a quota can make too many.
        group: The control group whose CPU quota limits it further; empty if none does.
    """

    count: int
    schedulable: int
    group: str = ""


def usable_cores(root: Path = Path("/")) -> Cores:
    """Return the smallest of CPU affinity and the CPU quotas of all control groups above.

    With more threads than a quota pays for, all of them stand still for the rest of each
    period: with a quota of one core, two threads of OpenBLAS had half the speed of one.
    A quota of a part of a core counts as a whole one.

    Args:
        root: The directory that holds ``proc`` and ``sys``; tests hand in a tree.
    """
    schedulable = _schedulable()
    count, group = min(_quotas(root), default=(schedulable, ""))
    if count >= schedulable:
        return Cores(schedulable, schedulable)
    return Cores(count, schedulable, group)


def _schedulable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[tuple[int, str]]:
    """Yield the cores that each control group with a quota allows, and its directory."""
    for directory, is_v2 in control_groups("cpu", root):
        if is_v2:
            figures = read_text(directory / "cpu.max").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            figures = [read_text(directory / name).strip() for name in names]
        # No limit is "max" in version 2, and -1 in version 1.
        if len(figures) == 2 and all(map(str.isdecimal, figures)) and int(figures[1]):
            quota, period = map(int, figures)
            yield max(1, -(-quota // period)), str(directory)
