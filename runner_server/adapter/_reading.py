"""Reads lazy weights: in order, a bounded part of them at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress

import mlx.core as mx

from mlxrunner.hostmemory import free_memory
from mlxrunner.units import format_bytes
from runner_server.errors import InsufficientMemory, ModelUnsupported, RunnerFault

_AT_ONCE_BYTES = 32 * 2**20
"""Weights that are read at the same time. MLX reads larger ones in pieces of this size."""

_MOST_ERRORS = 100_000
"""More reads than are ever begun; MLX is asked until it has no error left."""


def read_weights(weights: Sequence[mx.array], report: Callable[[float], None]) -> None:
    """Evaluates arrays, so that their files are read and their formats changed.

    Args:
        weights: Lazy arrays; must have been made on this thread.
        report: Called after each with the share that is done; what it raises ends the
            reading.

    Raises:
        InsufficientMemory: Memory ran out.
        ModelUnsupported: A file cannot be read.
    """
    total = max(1, sum(value.nbytes for value in weights))
    done = 0
    with closing(_evaluated(weights, total)) as evaluated:
        for value in evaluated:
            done += value.nbytes
            report(done / total)


def _evaluated(weights: Sequence[mx.array], total_bytes: int) -> Generator[mx.array]:
    """Yields arrays in their order once they are evaluated; those that follow have begun."""
    begun: deque[mx.array] = deque()
    begun_bytes = 0
    try:
        for value in weights:
            while begun and begun_bytes + value.nbytes > _AT_ONCE_BYTES:
                _evaluate(mx.eval, begun[0], total_bytes)
                begun_bytes -= begun[0].nbytes
                yield begun.popleft()
            _evaluate(mx.async_eval, value, total_bytes)
            begun.append(value)
            begun_bytes += value.nbytes
        while begun:
            _evaluate(mx.eval, begun[0], total_bytes)
            yield begun.popleft()
    finally:
        # After a fault or a cancel: until it is read, an array holds its memory.
        with suppress(RuntimeError):
            mx.eval(list(begun))
        _forget_errors()


def _forget_errors() -> None:
    """Has MLX raise what reads that were begun have left, so that nothing later meets it.

    An error on a stream's thread is raised by whatever is called next, once for each read.
    """
    for _ in range(_MOST_ERRORS):
        try:
            mx.synchronize(mx.default_stream(mx.cpu))
        except RuntimeError:
            continue
        return


def _evaluate(how: Callable[[mx.array], object], value: mx.array, total_bytes: int) -> None:
    try:
        how(value)
    except (RuntimeError, MemoryError) as error:
        raise _fault(error, total_bytes) from error


def _fault(error: Exception, total_bytes: int) -> RunnerFault:
    # MLX has no type of its own for it; its allocators say "[malloc] Unable to allocate".
    if isinstance(error, MemoryError) or "allocate" in str(error):
        available = free_memory().available_bytes
        return InsufficientMemory(
            f"memory ran out while reading {format_bytes(total_bytes)} of weights, "
            f"{format_bytes(available)} are free now; free memory, or load with another dtype",
            requiredBytes=total_bytes,
            availableBytes=available,
        )
    return ModelUnsupported(f"the weights cannot be read: {error}")
