"""Control groups of a test's own (version 1 or 2), where this machine allows making them."""

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
    """A group of processes whose memory, or CPU time, is limited together.

    Args:
        directory: Of the group, which exists.
        is_v2: Which version's files it has.
    """

    def __init__(self, directory: Path, *, is_v2: bool) -> None:
        self.directory = directory
        self._is_v2 = is_v2

    def limit(self, limit_bytes: int) -> None:
        """Sets the limit."""
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        (self.directory / name).write_text(str(limit_bytes))

    def limit_cpu(self, cores: float) -> None:
        """Sets a CPU quota."""
        quota = str(round(cores * 100_000))
        if self._is_v2:
            (self.directory / "cpu.max").write_text(f"{quota} 100000")
        else:
            (self.directory / "cpu.cfs_period_us").write_text("100000")
            (self.directory / "cpu.cfs_quota_us").write_text(quota)

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs in the group."""
        return ["sh", "-c", _ENTER, str(self.directory / "cgroup.procs"), *arguments]

    @property
    def used_bytes(self) -> int:
        """What its processes hold, with the pages of files that they have read."""
        name = "memory.current" if self._is_v2 else "memory.usage_in_bytes"
        return int((self.directory / name).read_text())

    @property
    def held_bytes(self) -> int:
        """What its processes hold, without the pages of files that the kernel can drop."""
        names = ("active_file", "inactive_file", "file_mapped")
        if not self._is_v2:
            names = ("total_active_file", "total_inactive_file", "total_mapped_file")
        active, inactive, mapped = map(self.statistics().__getitem__, names)
        return self.used_bytes - active - inactive + mapped

    def statistics(self) -> dict[str, int]:
        """The figures of memory.stat."""
        lines = (self.directory / "memory.stat").read_text().splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}

    @property
    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        name = "memory.events" if self._is_v2 else "memory.oom_control"
        lines = (self.directory / name).read_text().splitlines()
        return int(dict(map(str.split, lines))["oom_kill"])

    def kill(self) -> None:
        """Ends the processes that a failed test has left in it, stopped ones too."""
        for pid in map(int, (self.directory / "cgroup.procs").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Removes it as soon as its last process is gone."""
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
    """Makes a group, which is to be empty at the end of the block.

    Args:
        limit_bytes: What it may hold; by default it has no limit.
    """
    with _made("memory") as group:
        if limit_bytes is not None:
            group.limit(limit_bytes)
        yield group


@contextlib.contextmanager
def cpu_group(cores: float) -> Iterator[ControlGroup]:
    """Makes a group with a CPU quota, which is to be empty at the end of the block."""
    with _made("cpu") as group:
        group.limit_cpu(cores)
        yield group


@contextlib.contextmanager
def _made(controller: str) -> Iterator[ControlGroup]:
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
def why_not() -> str:
    """Why no group can be made here; empty if one can."""
    try:
        with control_group(1 << 30) as group:
            _ = group.used_bytes, group.oom_kills, group.held_bytes
    except (OSError, KeyError) as error:
        return f"memory control groups cannot be made here: {error}"
    return ""


@functools.cache
def why_no_cpu_group() -> str:
    """Why no CPU quota can be set here; empty if one can."""
    try:
        with cpu_group(1):
            pass
    except OSError as error:
        return f"CPU control groups cannot be made here: {error}"
    return ""


needs_control_group = pytest.mark.skipif(bool(why_not()), reason=why_not() or "they can")


needs_cpu_group = pytest.mark.skipif(
    bool(why_no_cpu_group()), reason=why_no_cpu_group() or "they can"
)


def write_uncached(path: Path, size: int) -> Path:
    """Writes a file whose pages are not in memory: they are counted where it is read."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path
