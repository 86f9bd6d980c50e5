"""Number of processor cores available to this process."""

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
    """Cores of this process.

    Attributes:
        count: Cores usable at once, at least 1.
        schedulable: Cores in the process's CPU affinity, possibly more than a quota allows.
        group: Directory of the control group whose CPU quota sets ``count``; empty if none does.
    """

    count: int
    schedulable: int
    group: str = ""


def usable_cores(root: Path = Path("/")) -> Cores:
    """Return the cores allowed by the CPU affinity and the quotas of this process's control groups.

    With more threads than a quota allows, all of them are suspended for the rest of each
    period: with a quota of one core, two threads of OpenBLAS ran at half the speed of one.
    A fraction of a core counts as a whole core.

    Args:
        root: The directory that contains ``proc`` and ``sys``, for tests.
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
    """Yield the cores allowed by each control group with a quota, and the group's directory."""
    for directory, is_v2 in control_groups("cpu", root):
        if is_v2:
            figures = read_text(directory / "cpu.max").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            figures = [read_text(directory / name).strip() for name in names]
        # "max" in version 2 and -1 in version 1 mean no limit.
        if len(figures) == 2 and all(map(str.isdecimal, figures)) and int(figures[1]):
            quota, period = map(int, figures)
            yield max(1, -(-quota // period)), str(directory)
