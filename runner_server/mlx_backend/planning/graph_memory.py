"""Memory that the arrays of a computation take while MLX evaluates it, without evaluating it.

A function is traced with ``mx.export_function``, which gives its primitives with the shapes
and formats of their results and computes nothing. The primitives are then put in the order in
which MLX evaluates them, and the bytes that live at each of them are added up.
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
"""Primitives whose results lie in the memory of their first input."""

_RESHAPES = frozenset(("Contiguous", "Flatten", "Reshape", "Unflatten"))
"""Views of an input that is contiguous, copies of one that is not."""

_SCATTERED = frozenset(("AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"))
"""Views that are not contiguous any more."""

_UPDATES = frozenset(("DynamicSliceUpdate", "SliceUpdate"))
"""Written into the memory of their first input, unless something else still needs that."""

_FRESH = frozenset(
    (
        *("ArgPartition", "ArgReduce", "ArgSort", "BlockMaskedMM", "Concatenate", "Convolution"),
        *("CustomKernel", "Gather", "GatherAxis", "GatherMM", "GatherQMM", "Matmul", "AddMM"),
        *("Pad", "Partition", "QuantizedMatmul", "Reduce", "Scan", "ScaledDotProductAttention"),
        *("Scatter", "ScatterAxis", "SegmentedMM", "Sort"),
    )
)
"""Primitives whose results are never written over an input. All others are element-wise."""

_WIDTH = 20
"""How many arrays MLX has under way before it goes deeper (``MLX_BFS_MAX_WIDTH``)."""


@dataclass(frozen=True)
class _Node:
    """One primitive of a trace."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Trace:
    """The primitives of a function, and the sizes of their results.

    Attributes:
        sizes: Bytes of each array by name.
        nodes: The primitive that each array comes from; none for inputs and constants.
        results: What the function returns.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.nodes: dict[str, _Node] = {}
        self.results: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Take what ``mx.export_function`` tells."""
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
    """Return the most that the intermediate arrays of a computation take together.

    Inputs and results are not counted, nor what is written into them in place.

    Args:
        function: Returns the arrays that are evaluated.
        inputs: What it is called with; need not be evaluated, and is not.
    """
    trace = _Trace()
    with _exportable():
        mx.export_function(trace, function, *inputs)
    return _peak(trace)


@contextmanager
def _exportable() -> Iterator[None]:
    """Replace the one operation that MLX cannot export by another that copies too."""
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
    """The memory of a trace while its primitives are evaluated one after the other.

    Several arrays may lie in one buffer. A buffer is free when the last primitive that reads
    any of them has been evaluated.
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
        """Give a primitive's results memory, and free what it read for the last time."""
        for index, name in enumerate(node.outputs):
            self._place(node, name, index)
        self.peak = max(self.peak, self._live)
        for name in set(node.inputs):
            self._readers[name] -= 1
            if not self._readers[name]:
                self._drop(name)
        for name in node.outputs:
            if not self._readers[name]:
                self._drop(name)

    def _place(self, node: _Node, name: str, index: int) -> None:
        source = self._source(node, name, index)
        if source is None:
            self._buffer[name] = name
            self._bytes[name] = 0 if name in self._kept else self._trace.sizes[name]
            self._live += self._bytes[name]
        else:
            self._buffer[name] = self._buffer.get(source, source)
        self._users[self._buffer[name]] += 1

    def _source(self, node: _Node, name: str, index: int) -> str | None:
        """Return the input in whose memory a result lies; None for memory of its own."""
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
        """Return an input of the same size that nothing needs after an element-wise primitive."""
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
        """Return the arrays whose memory is that of a result, which is not counted."""
        kept = set(self._trace.results)
        for node in reversed(order):
            if node.kind in _UPDATES | _VIEWS | _RESHAPES and kept.intersection(node.outputs):
                kept.add(node.inputs[0])
        return kept


def _evaluation_order(trace: _Trace) -> Iterable[_Node]:
    """Yield primitives in the order of MLX's ``eval_impl`` (mlx/transforms.cpp, 0.32).

    From the results down, breadth first with a limit on the width; then backwards.
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
    """Put an array on the tape when the last of its readers has asked for it."""
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
    """Count how often each array is read; an array and its siblings count together."""
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
