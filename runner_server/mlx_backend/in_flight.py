"""The tokens of the latest decode step, which MLX may still be computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx


@dataclass(frozen=True)
class InFlightStep:
    """The tokens drawn by the latest step, which MLX may still be computing.

    They are the inputs of the next step. The slot of a row that has just joined has its
    ``next_id``, which this step did not draw.

    Attributes:
        tokens: Token ids by slot, shape (rows,), uint32.
        finite: Whether the logits that each token was drawn from are finite, shape (rows,), bool.
    """

    tokens: mx.array
    finite: mx.array

    @classmethod
    def known(cls, ids: Sequence[int], are_finite: Sequence[bool]) -> InFlightStep:
        """Return a step that needs no computation."""
        return cls(mx.array(list(ids), dtype=mx.uint32), mx.array(list(are_finite), dtype=mx.bool_))

    def followed_by(self, other: InFlightStep) -> InFlightStep:
        """Return the slots of this step followed by the slots of another."""
        return InFlightStep(
            mx.concatenate([self.tokens, other.tokens]), mx.concatenate([self.finite, other.finite])
        )

    def kept(self, slots: Sequence[int]) -> InFlightStep:
        """Return some slots, in the order given."""
        index = mx.array(list(slots), dtype=mx.int32)
        return InFlightStep(self.tokens[index], self.finite[index])

    def wait(self) -> None:
        """Wait until the tokens are computed."""
        mx.eval(self.tokens, self.finite)

    def read(self) -> list[tuple[int, bool]]:
        """Wait for the tokens; return each id with a flag for finite logits."""
        ids = cast("list[int]", self.tokens.tolist())
        flags = cast("list[bool]", self.finite.tolist())
        return list(zip(ids, flags, strict=True))
