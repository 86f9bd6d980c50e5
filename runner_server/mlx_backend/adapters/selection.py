"""Adapters of the rows in a call of the model.

The layers of :mod:`~runner_server.mlx_backend.adapters.layers` read it while the model builds its
graph, so it must be set around each call: models have no argument for it. Adapters are numbered
from 1; 0 is the model without an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

BASE = 0
"""Number of the model without an adapter."""

_ANY = -1
"""In place of a number: any mixture of adapters, of as many rows as a layer gets."""


@dataclass(frozen=True)
class RowGroups:
    """Rows of a call by adapter.

    Attributes:
        rows: Indices of the rows of each adapter.
        order: Puts the rows of all groups, one after another, in the order of the call.
    """

    rows: Mapping[int, mx.array]
    order: mx.array


@dataclass(eq=False)
class Selection:
    """The adapters of the rows of the present call, by their numbers.

    Attributes:
        adapter: The adapter of all rows, if they have the same.
        rows: The adapter of each row, if they differ; None otherwise.
        tokens: Number of tokens of each row in the call.
    """

    adapter: int = BASE
    rows: tuple[int, ...] | None = None
    tokens: int = 1
    _derived: dict[object, object] = field(default_factory=dict)
    _derived_of: tuple[int, ...] = ()

    @contextmanager
    def of(self, adapters: Sequence[int], tokens: int = 1) -> Iterator[None]:
        """Select the adapter of each row for the calls within the context.

        Args:
            adapters: The adapter of each row.
            tokens: Number of tokens of each row in a call.
        """
        self.tokens = tokens
        if len(set(adapters)) > 1:
            with self._set(BASE, tuple(adapters)):
                yield
        else:
            with self._set(adapters[0] if adapters else BASE, None):
                yield

    @contextmanager
    def any_mixture(self) -> Iterator[None]:
        """Let the calls within the context take the memory of rows with different adapters."""
        with self._set(_ANY, None):
            yield

    @property
    def is_any(self) -> bool:
        """True if calls stand for any mixture of adapters, to learn the memory they take."""
        return self.adapter == _ANY

    @property
    def is_mixed(self) -> bool:
        """True if the rows have different adapters, or may have."""
        return self.rows is not None or self.adapter == _ANY

    def count(self, x: mx.array) -> int:
        """Return the number of rows of a mixed call, given the input of a layer.

        Raises:
            ValueError: The layer does not get all tokens of the call, so that nothing tells whose
                they are: some models select tokens for each expert.
        """
        if self.rows is None:
            return x.shape[0] if x.ndim > 1 else 0
        vectors = math.prod(x.shape[:-1])
        if vectors == 0 or vectors % (len(self.rows) * self.tokens):
            raise ValueError(
                f"a layer got {vectors} vectors of {len(self.rows)} rows with {self.tokens} tokens"
            )
        return len(self.rows)

    def number_of(self, row: int) -> int:
        """Return the adapter of a row of a mixed call."""
        return BASE if self.rows is None else self.rows[row]

    def derived(self, key: object, make: Callable[[], object]) -> object:
        """Return a value made from ``rows``, once for all layers and steps with the same rows."""
        if self.rows is None:
            return make()
        if self._derived_of != self.rows:
            self._derived.clear()
            self._derived_of = self.rows
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def groups(self) -> RowGroups:
        """Return the rows of a mixed call by adapter."""
        return cast("RowGroups", self.derived("groups", self._groups))

    def _groups(self) -> RowGroups:
        rows = self.rows or ()
        numbers = sorted(set(rows))
        members = {each: [row for row, own in enumerate(rows) if own == each] for each in numbers}
        joined = [row for own in members.values() for row in own]
        order = sorted(range(len(joined)), key=joined.__getitem__)
        return RowGroups({each: mx.array(own) for each, own in members.items()}, mx.array(order))

    @contextmanager
    def only(self, adapter: int) -> Iterator[None]:
        """Select one adapter for the part of a call within the context."""
        with self._set(adapter, None):
            yield

    @contextmanager
    def _set(self, adapter: int, rows: tuple[int, ...] | None) -> Iterator[None]:
        kept = self.adapter, self.rows
        self.adapter, self.rows = adapter, rows
        try:
            yield
        finally:
            self.adapter, self.rows = kept


@dataclass(frozen=True)
class Attached:
    """The adapters of a model.

    Attributes:
        names: Their names. The number of an adapter is its index in here, counted from 1.
        layers: The names of the layers that each of them changes.
        selection: The adapter of each row of a call.
    """

    names: tuple[str, ...] = ()
    layers: tuple[frozenset[str], ...] = ()
    selection: Selection = field(default_factory=Selection)

    def number(self, name: str) -> int:
        """Return the number of an adapter; that of the model itself for an empty name."""
        return self.names.index(name) + 1 if name else BASE

    @contextmanager
    def any_mixture(self) -> Iterator[None]:
        """See :meth:`Selection.any_mixture`; no-op without adapters."""
        if not self.names:
            yield
            return
        with self.selection.any_mixture():
            yield


NO_ADAPTERS = Attached()
