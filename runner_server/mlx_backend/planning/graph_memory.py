"""Memory of a computation's intermediate arrays, from a trace without evaluation.

``mx.export_function`` traces a function: it reports the primitives, with the shapes and dtypes of
their results, and computes nothing. This module puts the primitives in MLX's evaluation order, and
adds up the bytes that are live at each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

_VIEWS = frozenset(
    (
        *("AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Slice", "Split"),
        *("Squeeze", "StopGradient", "Transpose", "View"),
    )
)
"""Primitives whose results share the memory of their first input."""

_RESHAPES = frozenset(("Contiguous", "Flatten", "Reshape", "Unflatten"))
"""Primitives that return a view of a contiguous input, or a copy of any other input."""

_SCATTERED = frozenset(("AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"))
"""Primitives that return views which are not contiguous."""

_UPDATES = frozenset(("DynamicSliceUpdate", "SliceUpdate"))
"""Primitives that write into the memory of their first input, unless another reader needs it."""

_FRESH = frozenset(
    (
        *("ArgPartition", "ArgReduce", "ArgSort", "BlockMaskedMM", "Concatenate", "Convolution"),
        *("CustomKernel", "Gather", "GatherAxis", "GatherMM", "GatherQMM", "Matmul", "AddMM"),
        *("Pad", "Partition", "QuantizedMatmul", "Reduce", "Scan", "ScaledDotProductAttention"),
        *("Scatter", "ScatterAxis", "SegmentedMM", "Sort"),
    )
)
"""Primitives that always allocate their results. All others are element-wise."""

_WIDTH = 20
"""Number of pending arrays at which MLX goes depth first (``MLX_BFS_MAX_WIDTH``)."""


@dataclass(frozen=True)
class _Node:
    """One primitive of a trace."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Trace:
    """The primitives of a function, and the sizes of their results.

    Attributes:
        sizes: Bytes of each array, by name.
        nodes: The primitive that produces each array; inputs and constants have none.
        results: Names of the arrays that the function returns.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.nodes: dict[str, _Node] = {}
        self.results: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Record an event reported by ``mx.export_function``."""
        if event["type"] == "outputs":
            self.results = [name for name, _, _ in event["outputs"]]
        elif event["type"] == "primitive":
            node = _Node(
                event["name"],
                tuple(name for name, _, _ in event["inputs"]),
                tuple(name for name, _, _ in event["outputs"]),
            )
            for name, shape, dtype in event["outputs"]:
                self.sizes[name] = math.prod(shape) * dtype.size
                self.nodes[name] = node


def transient_bytes(function: Callable[..., Sequence[mx.array]], inputs: Sequence[mx.array]) -> int:
    """Return the peak memory of a computation's intermediate arrays, in bytes.

    Excludes inputs and results, and in-place writes into them.

    Args:
        function: Returns the arrays to evaluate.
        inputs: Arguments of the function. They are not evaluated.
    """
    trace = _Trace()
    with _exportable():
        mx.export_function(trace, function, *inputs)
    return _peak(trace)


@contextmanager
def _exportable() -> Iterator[None]:
    """Replace ``mx.contiguous``, which MLX cannot export, by another copy within the context."""
    contiguous = mx.contiguous
    mx.contiguous = _copied
    try:
        yield
    finally:
        mx.contiguous = contiguous


def _copied(array: mx.array, *_args: object, **_kwargs: object) -> mx.array:
    return mx.concatenate([array], axis=0) if array.ndim else array


def _peak(trace: _Trace) -> int:
    order = list(_evaluation_order(trace))
    memory = _Memory(trace, order)
    for node in order:
        memory.evaluate(node)
    return memory.peak


class _Memory:
    """Simulation of the live memory as MLX evaluates the primitives of a trace.

    Several arrays may share a buffer. The buffer is freed once the last primitive that reads any
    of these arrays has been evaluated.

    Args:
        trace: The trace.
        order: The primitives in evaluation order.

    Attributes:
        peak: Largest number of live bytes so far.
    """

    def __init__(self, trace: _Trace, order: Sequence[_Node]) -> None:
        self._trace = trace
        self._readers = Counter(name for node in order for name in set(node.inputs))
        self._readers.update(trace.results)
        self._buffer: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._bytes: dict[str, int] = {}
        self._scattered: set[str] = set()
        self._kept = self._result_buffers(order)
        self._live = 0
        self.peak = 0

    def evaluate(self, node: _Node) -> None:
        """Allocate a primitive's results, then free the inputs read for the last time."""
        for index, name in enumerate(node.outputs):
            self._allocate(node, name, index)
        self.peak = max(self.peak, self._live)
        for name in set(node.inputs):
            self._readers[name] -= 1
            if not self._readers[name]:
                self._drop(name)
        for name in node.outputs:
            if not self._readers[name]:
                self._drop(name)

    def _allocate(self, node: _Node, name: str, index: int) -> None:
        source = self._source(node, name, index)
        if source is None:
            self._buffer[name] = name
            self._bytes[name] = 0 if name in self._kept else self._trace.sizes[name]
            self._live += self._bytes[name]
        else:
            self._buffer[name] = self._buffer.get(source, source)
        self._users[self._buffer[name]] += 1

    def _source(self, node: _Node, name: str, index: int) -> str | None:
        """Return the input sharing memory with a result; None for a new buffer."""
        if not node.inputs:
            return None
        first = node.inputs[0]
        is_scattered = first in self._scattered
        if node.kind in _VIEWS or (node.kind in _RESHAPES and not is_scattered):
            if node.kind in _SCATTERED or is_scattered:
                self._scattered.add(name)
            return first
        if node.kind in _UPDATES:
            return first
        if node.kind in _RESHAPES or node.kind in _FRESH:
            return None
        return self._donor(node, name) if index == 0 else None

    def _donor(self, node: _Node, name: str) -> str | None:
        """Return an input of the same size, unread after this element-wise primitive."""
        for candidate in node.inputs:
            buffer = self._buffer.get(candidate)
            if (
                buffer is not None
                and self._readers[candidate] == 1
                and self._users[buffer] == 1
                and candidate not in self._scattered
                and self._bytes.get(buffer) == self._trace.sizes[name]
            ):
                return candidate
        return None

    def _drop(self, name: str) -> None:
        buffer = self._buffer.get(name)
        if buffer is None:
            return
        self._users[buffer] -= 1
        if not self._users[buffer]:
            self._live -= self._bytes.pop(buffer, 0)

    def _result_buffers(self, order: Sequence[_Node]) -> set[str]:
        """Return the arrays sharing memory with a result of the function, which are excluded."""
        kept = set(self._trace.results)
        for node in reversed(order):
            if node.kind in _UPDATES | _VIEWS | _RESHAPES and kept.intersection(node.outputs):
                kept.add(node.inputs[0])
        return kept


def _evaluation_order(trace: _Trace) -> Iterable[_Node]:
    """Yield primitives in the order of MLX's ``eval_impl`` (mlx/transforms.cpp, 0.32).

    MLX walks from the results to the inputs, breadth first up to a maximum width, and then
    evaluates the tape backwards.
    """
    degree = _degrees(trace)
    tape: list[str] = []
    stack: list[tuple[str | None, int]] = []
    position = -1
    while degree and (position < len(tape) or stack):
        if position >= len(tape):
            current, start = stack.pop()
        else:
            current, start = (tape[position] if position >= 0 else None), 0
            position += 1
        inputs = _inputs(trace, current)
        for index in range(start, len(inputs)):
            if len(tape) - position >= _WIDTH:
                stack.append((current, index))
                break
            _visit(trace, inputs[index], degree, tape)
    seen: set[int] = set()
    for name in reversed(tape):
        node = trace.nodes[name]
        if id(node) not in seen:
            seen.add(id(node))
            yield node


def _visit(trace: _Trace, name: str, degree: dict[str, int], tape: list[str]) -> None:
    """Put an array on the tape once all of its readers have been visited."""
    if name not in degree:
        return
    siblings = trace.nodes[name].outputs
    for sibling in siblings:
        degree[sibling] -= 1
    if degree[name] == 0:
        for sibling in siblings:
            del degree[sibling]
        tape.append(name)


def _inputs(trace: _Trace, name: str | None) -> Sequence[str]:
    return trace.results if name is None else trace.nodes[name].inputs


def _degrees(trace: _Trace) -> dict[str, int]:
    """Count the readers of each array; outputs of the same primitive share a count."""
    degree: dict[str, int] = {}
    todo: list[str | None] = [None]
    while todo:
        for name in _inputs(trace, todo.pop()):
            if name not in trace.nodes:
                continue
            if name not in degree:
                degree |= dict.fromkeys(trace.nodes[name].outputs, 0)
                todo.append(name)
            for sibling in trace.nodes[name].outputs:
                degree[sibling] += 1
    return degree
