"""Reading of weights: lazy arrays are evaluated in order, a bounded number of bytes at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.host_memory.free import free_memory
from runner_common.units import format_bytes
from runner_server.errors import InsufficientMemory, ModelUnsupported, RunnerFault
from runner_server.mlx_backend.loading.weight_files import WeightFiles
from runner_server.mlx_backend.planning.measure import arrays
from runner_server.mlx_backend.stream_errors import drain

_AT_ONCE_BYTES = 32 * 2**20
"""Weights evaluated at the same time; a larger weight is evaluated alone."""


class _Progress:
    """Progress of reading, estimated from evaluated weights and bytes read.

    Args:
        report: Called with the share, one call at a time.
        total_bytes: Bytes of all weights.
    """

    def __init__(self, report: Callable[[float], None], total_bytes: int) -> None:
        self._report = report
        self._total_bytes = total_bytes
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._begun_bytes = 0
        self._read_bytes = 0
        self._share = 0.0

    def begin(self, nbytes: int) -> None:
        """Count a weight whose evaluation begins."""
        with self._lock:
            self._begun_bytes += nbytes

    def note_read(self, nbytes: int) -> None:
        """Count bytes read from a file. Called on the reader's thread."""
        with self._lock:
            self._read_bytes += nbytes
            self._update()

    def note_done(self, nbytes: int) -> None:
        """Count an evaluated weight."""
        with self._lock:
            self._done_bytes += nbytes
            self._begun_bytes -= nbytes
            self._read_bytes = 0
            self._update()

    def _update(self) -> None:
        # A weight may be wider or narrower than its source, so bytes read are only an estimate.
        reached = self._done_bytes + min(self._read_bytes, self._begun_bytes)
        self._share = max(self._share, reached / self._total_bytes)
        self._report(self._share)


def read_files(path: Path, model: Module, report: Callable[[float], None]) -> None:
    """Read the weights of a model.

    Args:
        path: The model's directory.
        model: The model, with lazy weights.
        report: See :func:`read_weights`.

    Raises:
        InsufficientMemory: Memory ran out.
        ModelUnsupported: A file cannot be read, or was changed.
    """
    files = WeightFiles.of(model)
    try:
        read_weights(arrays(model), report, files)
    except ModelUnsupported as fault:
        if fault.metadata:
            raise
        # MLX's error does not name the file.
        text = f"{fault}; the files of {path} were changed while they were read"
        raise ModelUnsupported(text, model=str(path)) from fault
    # Arrays that are not parameters, such as the frequencies of rotary embeddings.
    mx.eval([list(module.values()) for _, module in model.named_modules()])
    files.check()


def read_weights(
    weights: Sequence[mx.array], report: Callable[[float], None], files: WeightFiles
) -> None:
    """Evaluate arrays, which reads their files and converts their dtypes.

    Args:
        weights: Lazy arrays, created on this thread.
        report: Called with the share done, 0 to 1: after each array on this thread, and after each
            block of a file on the thread that read it. An exception ends the reading.
        files: The files behind the arrays.

    Raises:
        InsufficientMemory: Memory ran out.
        ModelUnsupported: A file cannot be read.
    """
    total = max(1, sum(value.nbytes for value in weights))
    progress = _Progress(report, total)
    with files.reading(progress.note_read), closing(_evaluated(weights, progress, total)) as values:
        try:
            for value in values:
                files.check()
                progress.note_done(value.nbytes)
            files.check()
        except BaseException:
            # Make pending reads return early, without their bytes.
            files.stop()
            raise


def _evaluated(
    weights: Sequence[mx.array], progress: _Progress, total_bytes: int
) -> Generator[mx.array]:
    """Yield evaluated arrays in order, while the next ones are being evaluated."""
    begun: deque[mx.array] = deque()
    begun_bytes = 0
    try:
        for value in weights:
            while begun and begun_bytes + value.nbytes > _AT_ONCE_BYTES:
                _evaluate(mx.eval, begun[0], total_bytes)
                begun_bytes -= begun[0].nbytes
                yield begun.popleft()
            progress.begin(value.nbytes)
            _evaluate(mx.async_eval, value, total_bytes)
            begun.append(value)
            begun_bytes += value.nbytes
        while begun:
            _evaluate(mx.eval, begun[0], total_bytes)
            yield begun.popleft()
    finally:
        # After an error or a cancellation, wait: an array keeps its buffer until it has been read.
        with suppress(RuntimeError):
            mx.eval(list(begun))
        drain()


def _evaluate(how: Callable[[mx.array], object], value: mx.array, total_bytes: int) -> None:
    try:
        how(value)
    except (RuntimeError, MemoryError) as error:
        raise _fault(error, total_bytes) from error


def _fault(error: Exception, total_bytes: int) -> RunnerFault:
    # MLX has no exception type for this; its allocators say "[malloc] Unable to allocate".
    if isinstance(error, MemoryError) or "allocate" in str(error):
        available = free_memory().available_bytes
        return InsufficientMemory(
            f"memory ran out while reading {format_bytes(total_bytes)} of weights, "
            f"{format_bytes(available)} are free now; free memory, or load with another dtype",
            requiredBytes=total_bytes,
            availableBytes=available,
        )
    return ModelUnsupported(f"the weights cannot be read: {error}")
