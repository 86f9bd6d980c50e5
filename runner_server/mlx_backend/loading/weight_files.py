"""Weight files, which Python reads when MLX evaluates a tensor.

A read that fails inside MLX leaves MLX's count of active tasks too high for the rest of the
process, so that a later step may wait indefinitely
(:mod:`runner_server.mlx_backend.stream_errors`). MLX therefore gets a stream for each tensor whose
reads never fail: errors are recorded, and :meth:`WeightFiles.check` raises them on the engine's
thread. The bytes are read directly into MLX's memory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.safetensors import Tensor, parse_header
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.loading.lazy_arrays import TensorStream, lazy_arrays

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 * 2**20
"""Most bytes read between two checks for a cancelled load."""

_READERS = 4
"""Threads that read the blocks of large tensors. Small ones are read by MLX's own four threads."""

_MOST_OPEN = 64
"""Most files kept open. A model may have hundreds, and a process may be limited to 256."""

_UNUSED_SECONDS, _UNUSED_POLL_SECONDS = 1.0, 0.001

_ATTRIBUTE = "_weight_files"

OnRead = Callable[[int], object]


class WeightFiles:
    """The weight files of one model, whose tensors are read when they are evaluated."""

    def __init__(self) -> None:
        self._fault: BaseException | None = None
        self._is_stopped = False
        self._lock = threading.Lock()
        self._read: list[weakref.ref[TensorStream]] = []
        self._was_read: set[str] = set()
        self._given: dict[str, weakref.ref[TensorStream]] = {}
        self._open: list[_WeightFile] = []
        self._on_read: OnRead | None = None
        self._pool: ThreadPoolExecutor | None = None

    def attach(self, model: Module) -> None:
        """Attach this object to a model, so that it lives as long as the lazy weights."""
        object.__setattr__(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: Module) -> WeightFiles:
        """Return the instance attached to a model."""
        files: WeightFiles = vars(model)[_ATTRIBUTE]
        return files

    def load(self, path: str) -> dict[str, mx.array]:
        """Return lazy arrays for the tensors of a safetensors file; replaces ``mx.load``.

        Raises:
            HeaderError: The file's header is invalid.
            OSError: The file cannot be opened.
            ValueError: The file has a tensor that MLX does not support.
        """
        file = _WeightFile(path, keep_open=len(self._open) < _MOST_OPEN)
        self._open.append(file)
        fill = partial(self._fill, file)
        streams = [TensorStream(tensor, fill) for tensor in file.tensors]
        self._given.update((stream.tensor.name, weakref.ref(stream)) for stream in streams)
        try:
            return lazy_arrays(path, streams)
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            # This release of MLX may read archives without Python.
            logger.warning(
                "this MLX does not take weights from this process (%s): it reads %s itself, and "
                "a file that cannot be read may make it hang later",
                error,
                path,
            )
            return cast("dict[str, mx.array]", mx.load(path))

    @contextmanager
    def reading(self, on_read: OnRead) -> Iterator[None]:
        """Read large tensors with several threads within the context, and report the bytes read.

        Args:
            on_read: Called with the bytes of each block, on the thread that read it. Calls do not
                overlap. An exception ends the reading, and :meth:`check` raises it.
        """
        self._on_read = on_read
        with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._on_read = self._pool = None
                self.settle()
                self._open.clear()

    def settle(self) -> None:
        """Wait until MLX's reader threads have released finished streams.

        They do so shortly after the arrays are ready. If the process ends in between, the
        destructor of a stream cannot take the GIL, and aborts (4 of 300 runs). Destructors must not
        run Python code, which could release the GIL, so files stay open until all are read.
        """
        give_up = time.monotonic() + _UNUSED_SECONDS
        while any(stream() for stream in self._read) and time.monotonic() < give_up:
            time.sleep(_UNUSED_POLL_SECONDS)
        self._read.clear()

    def unused(self) -> frozenset[str]:
        """Return the names of tensors neither read yet nor referenced by an array.

        An array keeps its stream alive, so call this when only the model has arrays of
        :meth:`load`.
        """
        gone = {name for name, stream in self._given.items() if stream() is None}
        return frozenset(gone - self._was_read)

    def stop(self) -> None:
        """Make pending and future reads return without their bytes."""
        self._is_stopped = True

    def check(self) -> None:
        """Raise the first error of a read, if any; arrays read so far must not be used then."""
        # Not kept, because it would keep its traceback, and with it the arrays of the callers.
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _fill(self, file: _WeightFile, stream: TensorStream, memory: memoryview) -> None:
        """Read a tensor's bytes, on one of MLX's threads. Never raises."""
        self._read.append(weakref.ref(stream))
        tensor = stream.tensor
        self._was_read.add(tensor.name)
        blocks = range(0, len(memory), BLOCK_BYTES)
        pool = self._pool
        if pool is None or len(blocks) < 2:
            for start in blocks:
                self._fill_block(file, tensor, memory, start)
            return
        try:
            list(pool.map(self._fill_block, repeat(file), repeat(tensor), repeat(memory), blocks))
        except RuntimeError as error:  # no thread can be started
            self._fail(error)

    def _fill_block(
        self, file: _WeightFile, tensor: Tensor, memory: memoryview, start: int
    ) -> None:
        if self._is_stopped:
            return
        try:
            with memory[start : start + BLOCK_BYTES] as block:
                file.read(tensor, start, block)
                size = len(block)
            self._report_read(size)
        except BaseException as error:  # noqa: BLE001 - check() raises it, outside of MLX
            self._fail(error)

    def _report_read(self, nbytes: int) -> None:
        with self._lock:
            if self._on_read is None or self._is_stopped:
                return
            try:
                self._on_read(nbytes)
            except BaseException:
                # While holding the lock, so that `_on_read` is not called again.
                self.stop()
                raise

    def _fail(self, error: BaseException) -> None:
        self.stop()
        # A traceback would keep the buffer and the stream of the read alive.
        for each in (error, error.__cause__, error.__context__):
            if each:
                each.__traceback__ = None
        with self._lock:
            self._fault = self._fault or error


class _WeightFile:
    """A weight file, which either stays open until it is dropped or is opened for each read.

    Args:
        path: The file's path.
        keep_open: Whether the file stays open, so that reads see its original content even if it is
            replaced.
    """

    def __init__(self, path: str, *, keep_open: bool) -> None:
        self._path = Path(path)
        self._kept: int | None = None
        number = os.open(path, os.O_RDONLY)
        try:
            with open(number, "rb", closefd=False) as file:
                self.tensors = parse_header(file, self._path)
            self._identity = _identity(number)
            if keep_open:
                self._kept = number
        finally:
            if self._kept is None:
                os.close(number)

    def __del__(self) -> None:
        if getattr(self, "_kept", None) is not None:
            os.close(cast("int", self._kept))

    def read(self, tensor: Tensor, start: int, memory: memoryview) -> None:
        """Fill a buffer with a tensor's bytes, beginning at ``start``.

        Raises:
            ModelUnsupported: The bytes cannot be read, or no longer exist.
        """
        if self._kept is not None:
            self._read_from(self._kept, tensor, start, memory)
            return
        try:
            number = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(tensor, f"cannot be opened ({error.strerror}) for") from error
        try:
            if _identity(number) != self._identity:
                raise self._unreadable(tensor, "is another file now, and cannot be used for")
            self._read_from(number, tensor, start, memory)
        finally:
            os.close(number)

    def _read_from(self, number: int, tensor: Tensor, start: int, memory: memoryview) -> None:
        position, end = tensor.position + start, tensor.position + start + len(memory)
        try:
            while position < end:
                count = os.preadv(number, [memory[position - end :]], position)
                if not count:
                    size = os.fstat(number).st_size
                    raise self._unreadable(tensor, f"has only {size} bytes now, too few for")
                position += count
        except OSError as error:
            why = f"cannot be read at byte {position} ({error.strerror}), inside"
            raise self._unreadable(tensor, why) from error

    def _unreadable(self, tensor: Tensor, why: str) -> ModelUnsupported:
        return ModelUnsupported(
            f"{self._path} {why} {tensor.name}: the file was changed or the disk failed "
            "while it was read; download it again, or check the disk",
            model=str(self._path.parent),
        )


def _identity(number: int) -> tuple[int, ...]:
    """Return the device, inode, size and mtime, to detect a replaced or modified file."""
    found = os.fstat(number)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
