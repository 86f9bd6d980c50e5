"""Control groups of a process, including ancestors (cgroup v1 and v2)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def control_groups(
    controller: str, root: Path = Path("/"), process: str = "self"
) -> Iterator[tuple[Path, bool]]:
    """Yield every group of a process, leaf first, for each mounted hierarchy.

    Hybrid systems mount both versions. The one without the controller has none of its files.

    Args:
        controller: ``"memory"`` or ``"cpu"``.
        root: The directory that contains ``proc`` and ``sys``, for tests.
        process: A process id, or ``"self"``.

    Yields:
        The group's directory, and whether the group is of version 2.
    """
    mounts = list(_mounts(root, controller))
    for line in read_text(root / f"proc/{process}/cgroup").splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers != "" and controller not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for mount_kind, mount_root, mount_point in mounts:
            if mount_kind == kind:
                for directory in _upwards(mount_root, mount_point, group):
                    yield root / directory.lstrip("/"), kind == "cgroup2"


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, str, str]]:
    """Yield mounted hierarchies as (kind, group shown at the mount point, mount point)."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind_and_options = before.split(), after.split()
        if len(fields) < 5 or len(kind_and_options) < 3:
            continue
        kind, _, options = kind_and_options[:3]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            yield kind, fields[3], fields[4]


def _upwards(mount_root: str, mount_point: str, group: str) -> Iterator[str]:
    """Yield the directories from the group up to the mount point.

    In a container, ``/proc/self/cgroup`` may have the host's path of the group, while the mount
    shows only what is below that group. The mount point itself is the group then.
    """
    path = PurePosixPath(group)
    inside = path.is_relative_to(mount_root) and ".." not in path.parts
    relative = path.relative_to(mount_root) if inside else PurePosixPath()
    for step in (relative, *relative.parents):
        yield str(PurePosixPath(mount_point) / step)
        if step == PurePosixPath():
            return


def read_text(path: Path) -> str:
    """Return a file's text; empty if the file is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
