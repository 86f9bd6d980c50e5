"""Control groups (version 1 or 2) for tests, on machines where a process may create one."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
_GONE_SECONDS = 30.0
_ENTER = 'echo $$ > "$0" && exec "$@"'


class ControlGroup:
    """Control group with a limit on memory or CPU time.

    Args:
        directory: Directory of the group; must exist.
        is_v2: Whether the group belongs to version 2.
    """

    def __init__(self, directory: Path, *, is_v2: bool) -> None:
        self.directory = directory
        self._is_v2 = is_v2

    def limit(self, limit_bytes: int) -> None:
        """Set the memory limit."""
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        (self.directory / name).write_text(str(limit_bytes))

    def limit_cpu(self, cores: float) -> None:
        """Set the CPU quota."""
        quota = str(round(cores * 100_000))
        if self._is_v2:
            (self.directory / "cpu.max").write_text(f"{quota} 100000")
        else:
            (self.directory / "cpu.cfs_period_us").write_text("100000")
            (self.directory / "cpu.cfs_quota_us").write_text(quota)

    def command(self, *arguments: str) -> list[str]:
        """Return a command line for running ``arguments`` in the group."""
        return ["sh", "-c", _ENTER, str(self.directory / "cgroup.procs"), *arguments]

    @property
    def used_bytes(self) -> int:
        """Memory charged to the group, page cache included."""
        name = "memory.current" if self._is_v2 else "memory.usage_in_bytes"
        return int((self.directory / name).read_text())

    @property
    def held_bytes(self) -> int:
        """Memory charged to the group, without file pages which the kernel can drop."""
        names = ("active_file", "inactive_file", "file_mapped")
        if not self._is_v2:
            names = ("total_active_file", "total_inactive_file", "total_mapped_file")
        active, inactive, mapped = map(self.statistics().__getitem__, names)
        return self.used_bytes - active - inactive + mapped

    def statistics(self) -> dict[str, int]:
        """Return the figures of memory.stat."""
        lines = (self.directory / "memory.stat").read_text().splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}

    @property
    def oom_kills(self) -> int:
        """Number of processes in the group killed by the kernel for lack of memory."""
        name = "memory.events" if self._is_v2 else "memory.oom_control"
        lines = (self.directory / name).read_text().splitlines()
        return int(dict(map(str.split, lines))["oom_kill"])

    def kill(self) -> None:
        """Kill the processes left in the group by a failed test, stopped ones included."""
        for pid in map(int, (self.directory / "cgroup.procs").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Remove the group once the last process is gone."""
        deadline = time.monotonic() + _GONE_SECONDS
        while True:
            try:
                self.directory.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


@contextlib.contextmanager
def control_group(limit_bytes: int | None = None) -> Iterator[ControlGroup]:
    """Make a group, which must be empty at the end of the block.

    Args:
        limit_bytes: Memory limit; None sets none.
    """
    with _new_group("memory") as group:
        if limit_bytes is not None:
            group.limit(limit_bytes)
        yield group


@contextlib.contextmanager
def cpu_group(cores: float) -> Iterator[ControlGroup]:
    """Make a group with a CPU quota, which must be empty at the end of the block."""
    with _new_group("cpu") as group:
        group.limit_cpu(cores)
        yield group


@contextlib.contextmanager
def _new_group(controller: str) -> Iterator[ControlGroup]:
    is_v2 = not (_ROOT / controller).is_dir()
    parent = _ROOT if is_v2 else _ROOT / controller
    directory = parent / f"mlx-test-{secrets.token_hex(4)}"
    directory.mkdir()
    group = ControlGroup(directory, is_v2=is_v2)
    try:
        yield group
    except BaseException:
        group.kill()
        raise
    finally:
        group.remove()


@functools.cache
def memory_group_problem() -> str:
    """Return the reason why memory groups cannot be made here, or an empty string."""
    try:
        with control_group(1 << 30) as group:
            _ = group.used_bytes, group.oom_kills, group.held_bytes
    except (OSError, KeyError) as error:
        return f"memory control groups cannot be made here: {error}"
    return ""


@functools.cache
def cpu_group_problem() -> str:
    """Return the reason why CPU quotas cannot be set here, or an empty string."""
    try:
        with cpu_group(1):
            pass
    except OSError as error:
        return f"CPU control groups cannot be made here: {error}"
    return ""


needs_control_group = pytest.mark.skipif(
    bool(memory_group_problem()), reason=memory_group_problem() or "they can"
)


needs_cpu_group = pytest.mark.skipif(
    bool(cpu_group_problem()), reason=cpu_group_problem() or "they can"
)


def write_uncached(path: Path, size: int) -> Path:
    """Write a file and drop its pages from the page cache.

    The kernel charges the pages to the group of the process that reads them next.
    """
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path
