"""Memory available to a process under the limits of its control groups (cgroup v1 and v2).

Inside a container, the system's figure is that of the host, while the process's group or any of its
ancestors may allow far less. See https://docs.kernel.org/admin-guide/cgroup-v2.html and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner_common.host_memory.control_groups import control_groups, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_LIMIT_BYTES = 1 << 60
"""Limit from which a value means no limit: v1 then reports 2**63, rounded down to a page."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Names of one cgroup version's files and statistics."""

    limits: tuple[str, ...]
    usage: str
    files: tuple[str, ...]
    mapped: str
    slab: str


# memory.high is not a hard limit, but the kernel throttles a process above it almost to a
# standstill, so a load must stay below it too.
_V2 = _Layout(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
    "file_mapped",
    "slab_reclaimable",
)
_V1 = _Layout(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "total_mapped_file",
    "",
)


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """Memory still available in one control group.

    Attributes:
        path: The group's directory.
        available_bytes: Memory that the group's processes may still take together.
    """

    path: str
    available_bytes: int


def cgroup_limits(root: Path = Path("/")) -> tuple[GroupLimit, ...]:
    """Return the memory available in each group with a limit, the process's own group first.

    Usage excludes file pages that the kernel drops before it refuses memory. After a model has been
    read they are most of the usage. Active pages, of files read twice, are dropped like the others;
    only pages that processes map count as used.

    Args:
        root: The directory that contains ``proc`` and ``sys``, for tests.
    """
    return tuple(
        GroupLimit(str(directory), available)
        for directory, layout in _groups(root)
        if (available := _group_available(directory, layout)) is not None
    )


def is_in_group(pid: int, path: str, root: Path = Path("/")) -> bool:
    """Return whether a process is in a group or in one of its descendants; True if unknown.

    Args:
        pid: The process.
        path: The group's directory, as ``GroupLimit.path``.
        root: The directory that contains ``proc`` and ``sys``, for tests.
    """
    directories = [str(directory) for directory, _ in _groups(root, str(pid))]
    return not directories or path in directories


def _groups(root: Path, process: str = "self") -> Iterator[tuple[Path, _Layout]]:
    """Yield every group of a process, leaf first, for each mounted hierarchy."""
    for directory, is_v2 in control_groups("memory", root, process):
        yield directory, _V2 if is_v2 else _V1


def _group_available(directory: Path, layout: _Layout) -> int | None:
    limits = [
        limit
        for name in layout.limits
        if (limit := _number(read_text(directory / name))) is not None and limit < _NO_LIMIT_BYTES
    ]
    usage = _number(read_text(directory / layout.usage))
    if not limits or usage is None:
        return None
    stat = dict(
        fields
        for line in read_text(directory / "memory.stat").splitlines()
        if len(fields := line.split()) == 2
    )
    reclaimable = _reclaimable(stat, layout)
    return max(0, min(limits) - max(0, usage - reclaimable))


def _reclaimable(stat: dict[str, str], layout: _Layout) -> int:
    """Return the bytes of a group the kernel would drop before refusing memory."""

    def figure(name: str) -> int:
        return _number(stat.get(name, "")) or 0

    unmapped = sum(map(figure, layout.files)) - figure(layout.mapped)
    return max(0, unmapped) + figure(layout.slab)


def _number(text: str) -> int | None:
    """Parse a number; return None for ``max`` and for an empty text."""
    text = text.strip()
    return int(text) if text.isdecimal() else None
