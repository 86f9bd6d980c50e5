"""Weight files that this process reads itself, at the moment when MLX evaluates a tensor.

A read that fails inside MLX leaves its count of active tasks too high for the rest of the
process, and a later step may wait indefinitely
(:mod:`runner_server.mlx_backend.stream_errors`). MLX therefore gets a stream for each tensor whose
reads always succeed: the stream records errors, and :meth:`WeightFiles.check` raises them on the
engine's thread. The bytes are read straight into MLX's own memory.
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

PIECE_BYTES = 8 * 2**20
"""The most that is read without a look at whether the load goes on."""

_READERS = 4
"""Threads that read the pieces of large tensors. MLX has as many of its own for small ones."""

_MOST_OPEN = 64
"""Files that stay open: a model may have hundreds, and a process may be allowed 256."""

_UNUSED_SECONDS, _UNUSED_POLL_SECONDS = 1.0, 0.001

_ATTRIBUTE = "_weight_files"

OnRead = Callable[[int], object]


class WeightFiles:
    """Reads the tensors of one model when MLX evaluates them."""

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
        """Have a model carry what its lazy weights are read by; it goes with the model."""
        object.__setattr__(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: Module) -> WeightFiles:
        """Return what was attached to a model."""
        files: WeightFiles = vars(model)[_ATTRIBUTE]
        return files

    def load(self, path: str) -> dict[str, mx.array]:
        """Return lazy arrays of a safetensors file's tensors; in place of ``mx.load``.

        Raises:
            HeaderError: The file's header is not true.
            OSError: The file cannot be opened.
            ValueError: It has a tensor that MLX cannot hold.
        """
        file = _WeightFile(path, keep_open=len(self._open) < _MOST_OPEN)
        self._open.append(file)
        fill = partial(self._fill, file)
        streams = [TensorStream(tensor, fill) for tensor in file.tensors]
        self._given.update((stream.tensor.name, weakref.ref(stream)) for stream in streams)
        try:
            return lazy_arrays(path, streams)
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            # Another release of MLX may read archives without Python.
            logger.warning(
                "this MLX does not take weights from this process (%s): it reads %s itself, and "
                "a file that cannot be read may make it hang later",
                error,
                path,
            )
            return cast("dict[str, mx.array]", mx.load(path))

    @contextmanager
    def reading(self, on_read: OnRead) -> Iterator[None]:
        """Read large tensors in parallel, and report what is read.

        Args:
            on_read: Called with the bytes of each piece, on the thread that read it, one call
                at a time; what it raises ends the reading and is raised by :meth:`check`.
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
        """Wait until MLX's reading threads have dropped the streams that they have read.

        They do it a moment after the arrays are there. In a process that ends just then, the
        destructor of a stream cannot take Python's lock, and aborts (4 of 300 runs). It must run no
        Python code, in which it could lose that lock: the files stay open until all are read.
        """
        give_up = time.monotonic() + _UNUSED_SECONDS
        while any(stream() for stream in self._read) and time.monotonic() < give_up:
            time.sleep(_UNUSED_POLL_SECONDS)
        self._read.clear()

    def unused(self) -> frozenset[str]:
        """Return the names of tensors that were not read and that no array waits for.

        To be called when nothing is left of what :meth:`load` returned but the model: an array
        keeps the streams that it will be read from.
        """
        gone = {name for name, stream in self._given.items() if stream() is None}
        return frozenset(gone - self._was_read)

    def stop(self) -> None:
        """Have reads that are under way, and all that follow, return without their bytes."""
        self._is_stopped = True

    def check(self) -> None:
        """Raise what went wrong: arrays that were read before this call are not to be used."""
        # Kept here, it would keep its traceback and so the arrays of this call's callers.
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _fill(self, file: _WeightFile, stream: TensorStream, memory: memoryview) -> None:
        """Read a tensor's bytes, on a thread of MLX; never raises."""
        self._read.append(weakref.ref(stream))
        tensor = stream.tensor
        self._was_read.add(tensor.name)
        pieces = range(0, len(memory), PIECE_BYTES)
        pool = self._pool
        if pool is None or len(pieces) < 2:
            for start in pieces:
                self._fill_piece(file, tensor, memory, start)
            return
        try:
            list(pool.map(self._fill_piece, repeat(file), repeat(tensor), repeat(memory), pieces))
        except RuntimeError as error:  # no thread can be started
            self._fail(error)

    def _fill_piece(
        self, file: _WeightFile, tensor: Tensor, memory: memoryview, start: int
    ) -> None:
        if self._is_stopped:
            return
        try:
            with memory[start : start + PIECE_BYTES] as piece:
                file.read(tensor, start, piece)
                size = len(piece)
            self._tell(size)
        except BaseException as error:  # noqa: BLE001 - raised by check, and not inside MLX
            self._fail(error)

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            if self._on_read is None or self._is_stopped:
                return
            try:
                self._on_read(nbytes)
            except BaseException:
                # Still under the lock: it is not called again.
                self.stop()
                raise

    def _fail(self, error: BaseException) -> None:
        self.stop()
        # Tracebacks would hold the memory and the stream of what was being read.
        for each in (error, error.__cause__, error.__context__):
            if each:
                each.__traceback__ = None
        with self._lock:
            self._fault = self._fault or error


class _WeightFile:
    """A weight file, open until its last tensor is read or dropped, or else while it is read.

    Args:
        path: Where it is.
        keep_open: Whether it stays open, so that it is read as it was even if it is replaced.
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
        """Fill memory with a tensor's bytes from ``start`` on.

        Raises:
            ModelUnsupported: They cannot be read, or are no longer there.
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
    """Return what tells an open file from another one of its name, and from its later self."""
    found = os.fstat(number)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
