"""Sweeps of one property over many parameters, of which `make test` runs a sample."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet


def sampled(values: Iterable[Any], kept: Collection[Any]) -> list[ParameterSet]:
    """Mark the parameters outside a sample as ``exhaustive``.

    Args:
        values: Arguments of each test; a tuple for several arguments.
        kept: The values that `make test` runs as well.
    """
    found = [*values]
    assert all(value in found for value in kept), "the sample has a value of its own"
    marks = {True: (), False: (pytest.mark.exhaustive,)}
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks[value in kept])
        for value in found
    ]


def diagonal(*axes: Sequence[Any]) -> list[ParameterSet]:
    """Sample combinations: every value of two axes, every pair of values of three.

    The positions of the values on their axes add up to a multiple of the shortest axis.
    """
    shortest = min(map(len, axes))
    combinations = list(itertools.product(*(enumerate(axis) for axis in axes)))
    kept = [each for each in combinations if sum(place for place, _ in each) % shortest == 0]

    def values(placed: Iterable[Iterable[tuple[int, Any]]]) -> list[Any]:
        return [tuple(value for _, value in each) for each in placed]

    return sampled(values(combinations), values(kept))
