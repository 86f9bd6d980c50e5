"""Directory of blocks within a byte budget, which several processes may share.

Only the two threads of a store touch files, except for the first listing. A failure costs no
request more than the evaluation of its tokens: the store logs the failure and goes on without the
file. Processes that share a directory do not talk to each other. Each lists the directory now and
then, deletes the files that were not used for longest when all together exceed its budget, and
expects any file to vanish.
"""

from __future__ import annotations

import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner_common.units import format_bytes
from runner_server.engine.prefix_disk.block_files import (
    BLOCK_FILE,
    HEADER_BYTES,
    TEMPORARY_FILE,
    DamagedBlockError,
    block_path,
    read_block,
    write_block,
)

logger = logging.getLogger(__name__)

_KEPT_SHARE = 0.95
"""Share of the budget that an eviction leaves, so that not every write lists the directory."""

_LISTED_SHARE = 1 / 16
"""Share of the budget that a process writes before it lists the directory again, to learn about the
blocks of others."""

_LISTING_SECONDS = 60.0
"""Age of a listing at which the next write lists the directory again."""

_PAUSE_SECONDS = 60.0
"""Time without writes after one that failed."""

_HANG_SECONDS = 5.0
"""Time of a write from which on the engine no longer waits for the next one."""

_TOUCH_SECONDS = 600.0
"""Age of a file's last use from which another use is noted."""

_TEMPORARY_SECONDS = 600.0
"""Age of a temporary file whose process must have been killed."""


@dataclass(frozen=True)
class PrefixDiskSettings:
    """Settings of the prefix cache on disk.

    Attributes:
        directory: The directory, which is created if necessary.
        budget_bytes: Most bytes of all files in the directory.
    """

    directory: Path
    budget_bytes: int


@dataclass
class DiskCounters:
    """Counters of a store, which may be read on any thread.

    Attributes:
        held_bytes: Bytes of all files in the directory, as far as known.
        written_bytes: Bytes of the blocks written since the load.
        read_bytes: Bytes of the blocks read since the load.
        damaged_count: Files removed since the load because they were damaged.
    """

    held_bytes: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    damaged_count: int = 0


class BlockStore:
    """Blocks in a directory, for the use of one thread.

    Args:
        directory: A private directory, which exists.
        budget_bytes: Most bytes of all files together.
        block_bytes: Bytes of the payload of this model's blocks.
        queued: Most blocks that wait to be written.

    Attributes:
        counters: Bytes read and written.

    Raises:
        OSError: The directory cannot be listed.
    """

    def __init__(
        self, directory: Path, budget_bytes: int, block_bytes: int, queued: int = 1
    ) -> None:
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._block_bytes = block_bytes
        # The known blocks, with the time of their last known use. Changed by single operations.
        self._used: dict[str, float] = {}
        self.counters = DiskCounters()
        self._listed_at = 0.0
        self._unlisted_bytes = 0
        self._paused_until = 0.0
        self._write_began: float | None = None
        self._is_failing = False
        self._list()
        self._room = threading.Semaphore(queued)
        self._writer = _Worker("prefix-writer")
        self._reader = _Worker("prefix-reader")

    def __contains__(self, name: str) -> bool:
        return name in self._used

    @property
    def is_paused(self) -> bool:
        """True for a while after a failed write, and during an overlong write."""
        now = time.monotonic()
        return now < self._paused_until or now - (self._write_began or now) > _HANG_SECONDS

    def wait_room(self, seconds: float) -> bool:
        """Wait until a block may be queued, which the caller then must do."""
        return self._room.acquire(blocking=seconds > 0, timeout=seconds or None)

    def write(self, name: str, payload: bytes) -> None:
        """Queue a block to be written, after :meth:`wait_room`."""
        self._used[name] = time.time()
        self._writer.put(partial(self._write, name, payload))

    def cancel_room(self) -> None:
        """Give back the room of :meth:`wait_room` without a block."""
        self._room.release()

    def read(self, name: str) -> Future[bytearray | None]:
        """Read a block on another thread; the result of a lost or damaged block is None."""
        future: Future[bytearray | None] = Future()
        self._reader.put(partial(self._read, name, future))
        return future

    def touch(self, names: Sequence[str], *, is_new: bool = False) -> None:
        """Note the use of a sequence, to delete the last blocks before the first ones.

        Args:
            names: The blocks in order.
            is_new: Whether some were just written. If not, their use is noted every 10 minutes.
        """
        now = time.time()
        if is_new or any(now - self._used.get(name, now) > _TOUCH_SECONDS for name in names):
            self._used.update({name: now for name in names if name in self._used})
            self._writer.put(partial(self._touch, names))

    def remove(self, names: Iterable[str]) -> None:
        """Remove blocks."""
        known = [name for name in names if self._used.pop(name, None) is not None]
        if known:
            self._writer.put(partial(self._remove, known))

    def close(self, seconds: float) -> None:
        """Write the queued blocks, for a limited time, and end the threads."""
        self._reader.close(0.0)
        self._writer.close(seconds)

    # -- on the threads ----------------------------------------------------------

    def _write(self, name: str, payload: bytes) -> None:
        if self.is_paused:
            self._used.pop(name, None)
            self._room.release()
            return
        self._write_began = time.monotonic()
        try:
            size = HEADER_BYTES + len(payload)
            self._make_room(size)
            write_block(self._directory, name, payload)
        except (OSError, MemoryError) as error:
            self._used.pop(name, None)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            self._warn("written to", error)
        else:
            self._is_failing = False
            # Again: a reader that was faster than this write took the block for lost.
            self._used[name] = time.time()
            self._unlisted_bytes += size
            self.counters.held_bytes += size
            self.counters.written_bytes += size
        finally:
            self._write_began = None
            self._room.release()

    def _read(self, name: str, future: Future[bytearray | None]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        payload = None
        try:
            payload = read_block(self._directory, name, self._block_bytes)
            self.counters.read_bytes += HEADER_BYTES + len(payload)
        except DamagedBlockError as error:
            self._used.pop(name, None)
            self.counters.damaged_count += 1
            path = block_path(self._directory, name)
            logger.warning("%s is damaged and will be removed: %s", path, error)
            self._writer.put(partial(self._remove, [name]))
        except FileNotFoundError:
            # Deleted by a process that shares the directory.
            self._used.pop(name, None)
        except (OSError, MemoryError) as error:
            self._used.pop(name, None)
            self._warn("read from", error)
        future.set_result(payload)

    def _touch(self, names: Sequence[str]) -> None:
        now = time.time_ns()
        for i, name in enumerate(names):
            # Given, because the system's own time of a file advances in steps of milliseconds.
            used = now - i
            try:
                os.utime(block_path(self._directory, name), ns=(used, used), follow_symlinks=False)
            except OSError:
                self._used.pop(name, None)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            # Again: the block may have been queued to be written before.
            self._used.pop(name, None)
            self._unlink(block_path(self._directory, name))

    def _make_room(self, size: int) -> None:
        """Delete the least recently used blocks, if the budget would be exceeded."""
        age = time.monotonic() - self._listed_at
        is_over = self.counters.held_bytes + size > self._budget_bytes
        is_stale = self._unlisted_bytes > self._budget_bytes * _LISTED_SHARE
        if not (is_over or is_stale or age > _LISTING_SECONDS):
            return
        files = self._list()
        if self.counters.held_bytes + size <= self._budget_bytes:
            return
        for _, nbytes, path in sorted(files):
            if self.counters.held_bytes + size <= self._budget_bytes * _KEPT_SHARE:
                break
            self._unlink(path)
            self._used.pop(path.stem, None)
            self.counters.held_bytes -= nbytes

    def _list(self) -> list[tuple[int, int, Path]]:
        """List the directory; return the time of use, size and path of each block."""
        files: list[tuple[int, int, Path]] = []
        total, began = 0, time.time()
        with os.scandir(self._directory) as entries:
            for entry in entries:
                is_block = BLOCK_FILE.fullmatch(entry.name)
                if not (is_block or TEMPORARY_FILE.fullmatch(entry.name)):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                path = Path(entry.path)
                if not is_block and began - status.st_mtime > _TEMPORARY_SECONDS:
                    self._unlink(path)
                    continue
                total += status.st_size
                if is_block and not stat.S_ISDIR(status.st_mode):
                    files.append((status.st_mtime_ns, status.st_size, path))
        found = {path.stem: used / 1e9 for used, _, path in files}
        # A copy, because the engine's thread may add a block meanwhile, which stays.
        for name, used in self._used.copy().items():
            if used < began and name not in found:
                self._used.pop(name, None)
        self._used.update(found)
        self.counters.held_bytes = total
        self._unlisted_bytes = 0
        self._listed_at = time.monotonic()
        return files

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn("cleared of", error)

    def _warn(self, what: str, error: BaseException) -> None:
        """Log a failure, but no second one before something was written."""
        if not self._is_failing:
            self._is_failing = True
            logger.warning(
                "the prefix cache on disk cannot be %s (%s holds %s): %s; requests go on without",
                what,
                self._directory,
                format_bytes(self.counters.held_bytes),
                error,
            )


class _Worker:
    """Daemon thread for jobs in order."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self, seconds: float) -> None:
        """End the thread after the queued jobs, with a limited wait."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while job := self._jobs.get():
            try:
                job()
            except Exception:
                logger.exception("a job of the prefix cache on disk failed")
