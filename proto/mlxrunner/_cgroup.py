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
    """The file names of one cgroup version."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# memory.high is no hard limit, but a process above it is throttled until it
# hardly moves, so a load must stay below it too.
_V2 = _Layout(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Layout(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def cgroup_available_bytes(root: Path = Path("/")) -> int | None:
    """The least that this process's group or any group above it still allows.

    A group's usage is counted without its inactive page cache: the kernel
    drops those pages before it refuses memory, and after a model file has been
    read once they are most of the usage. (Kubernetes calls the same difference
    the working set.)

    Args:
        root: The directory that holds ``proc`` and ``sys``; tests hand in a tree.

    Returns:
        Bytes, never negative; None where no group limits memory or nothing can be read.
    """
    allowed = [
        available
        for directory, layout in _groups(root)
        if (available := _group_available(directory, layout)) is not None
    ]
    return min(allowed, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, _Layout]]:
    """Every group this process is in, leaf first, for each mounted hierarchy.

    Hybrid systems mount both versions, with the memory controller in one of
    them: the other has no memory files and drops out by itself.
    """
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
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
    reclaimable = _number(stat.get(layout.reclaimable, "")) or 0
    return max(0, min(limits) - max(0, usage - reclaimable))


def _number(text: str) -> int | None:
    """The number in the text; None for ``max`` and for nothing at all."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """The file's text; empty where it does not exist or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
