"""Vectors of texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of a text."""

    values: tuple[float, ...]
    """The numbers, each exact to 32 bits; of length 1 if the model's files normalize."""
    token_count: int
    """The number of tokens in the text, with the special ones around it."""
