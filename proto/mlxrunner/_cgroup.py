"""Memory a control group still allows, over all of its ancestors (cgroup v1 and v2).

Inside a container the system's own figure is the host's: the group of the
process, or any group above it, may allow far less. See
https://docs.kernel.org/admin-guide/cgroup-v2.html and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_LIMIT_BYTES = 1 << 60
"""v1 has no word for "no limit": it reports 2**63 rounded down to a page."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The names of files and statistics of one cgroup version."""

    limits: tuple[str, ...]
    usage: str
    files: tuple[str, ...]
    mapped: str
    slab: str


# memory.high is not a hard limit, but a process above it is throttled until it
# hardly moves, so a load must stay below it too.
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
    """What one control group still allows.

    Attributes:
        path: The group's directory.
        available_bytes: The memory that its processes may still take together.
    """

    path: str
    available_bytes: int


def cgroup_available_bytes(root: Path = Path("/")) -> int | None:
    """Return the least that this process's group or any group above it still allows.

    Args:
        root: The directory that holds ``proc`` and ``sys``; tests hand in a tree.

    Returns:
        Bytes, never negative; None where no group limits memory or nothing can be read.
    """
    return min((limit.available_bytes for limit in cgroup_limits(root)), default=None)


def cgroup_limits(root: Path = Path("/")) -> tuple[GroupLimit, ...]:
    """Return what each group that limits this process still allows, its own group first.

    A group's usage is counted without the file pages that the kernel drops before it
    refuses memory, which are most of the usage after a model has been read: pages of a
    file that was read twice lie in the active list and are dropped like the others, and
    only those that processes have mapped are counted as used.

    Args:
        root: The directory that holds ``proc`` and ``sys``; tests hand in a tree.
    """
    return tuple(
        GroupLimit(str(directory), available)
        for directory, layout in _groups(root)
        if (available := _group_available(directory, layout)) is not None
    )


def is_in_group(pid: int, path: str, root: Path = Path("/")) -> bool:
    """Whether a process is in a group, or in one below it. True where that cannot be told.

    Args:
        pid: The process.
        path: The group's directory, as ``GroupLimit.path``.
        root: The directory that holds ``proc`` and ``sys``; tests hand in a tree.
    """
    directories = [str(directory) for directory, _ in _groups(root, str(pid))]
    return not directories or path in directories


def _groups(root: Path, process: str = "self") -> Iterator[tuple[Path, _Layout]]:
    """Yield every group a process is in, leaf first, for each mounted hierarchy.

    Hybrid systems mount both versions, with the memory controller in one of
    them: the other has no memory files and drops out by itself.
    """
    mounts = list(_mounts(root))
    for line in _read(root / f"proc/{process}/cgroup").splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            layout, kind = _V2, "cgroup2"
        elif "memory" in controllers.split(","):
            layout, kind = _V1, "cgroup"
        else:
            continue
        for mount_kind, mount_root, mount_point in mounts:
            if mount_kind == kind:
                for directory in _upwards(mount_root, mount_point, group):
                    yield root / directory.lstrip("/"), layout


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Mounted hierarchies as (kind, group shown at the mount point, mount point)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind_and_options = before.split(), after.split()
        if len(fields) < 5 or len(kind_and_options) < 3:
            continue
        kind, _, options = kind_and_options[:3]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield kind, fields[3], fields[4]


def _upwards(mount_root: str, mount_point: str, group: str) -> Iterator[str]:
    """Directories from the group up to the mount point.

    ``/proc/self/cgroup`` can name the host's path while the mount shows only the
    part below the container's own group: then the mount point is that group.
    """
    path = PurePosixPath(group)
    inside = path.is_relative_to(mount_root) and ".." not in path.parts
    relative = path.relative_to(mount_root) if inside else PurePosixPath()
    for step in (relative, *relative.parents):
        yield str(PurePosixPath(mount_point) / step)
        if step == PurePosixPath():
            return


def _group_available(directory: Path, layout: _Layout) -> int | None:
    limits = [
        limit
        for name in layout.limits
        if (limit := _number(_read(directory / name))) is not None and limit < _NO_LIMIT_BYTES
    ]
    usage = _number(_read(directory / layout.usage))
    if not limits or usage is None:
        return None
    stat = dict(
        fields
        for line in _read(directory / "memory.stat").splitlines()
        if len(fields := line.split()) == 2
    )
    reclaimable = _reclaimable(stat, layout)
    return max(0, min(limits) - max(0, usage - reclaimable))


def _reclaimable(stat: dict[str, str], layout: _Layout) -> int:
    """Return the bytes of a group that the kernel drops before it refuses memory."""

    def figure(name: str) -> int:
        return _number(stat.get(name, "")) or 0

    unmapped = sum(map(figure, layout.files)) - figure(layout.mapped)
    return max(0, unmapped) + figure(layout.slab)


def _number(text: str) -> int | None:
    """Return the number in the text; None for ``max`` and for an empty text."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """The file's text; empty where it does not exist or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
