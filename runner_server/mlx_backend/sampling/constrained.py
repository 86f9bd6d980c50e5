"""Sampling of a batch in which constraints limit the tokens of some rows."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.arrays import rows_of
from runner_server.mlx_backend.constraints.matcher import RowMatcher
from runner_server.mlx_backend.sampling.mask_rows import MaskRows
from runner_server.mlx_backend.sampling.masks import TokenMasks
from runner_server.mlx_backend.sampling.sampler import Sampler

FEW = 64
"""Most tokens that are drawn from their own logits alone. 85 % of the masks of a JSON schema have
no more (an array of objects with texts, numbers and choices, 151,936 tokens)."""

_LARGE_VOCABULARY = 16_384
"""Number of tokens from which choosing among few of them takes less time than adding a mask."""

_NOT_EMPTY = re.compile(rb"[^\0]")


class ConstrainedSampler:
    """Samples one token for each row, of those that the row's constraint allows.

    The rows are drawn in three groups: those without a constraint; those of a large vocabulary with
    few tokens to choose from, whose logits are gathered; and all others, where a mask of the whole
    vocabulary is added. Rows with few take less time than rows without a constraint.

    Args:
        options: The sampling options of each row.
        matchers: The matcher of each row; None for a row without a constraint.
        vocab_size: Number of token ids.
        mask_rows: Turns masks into what they add to logits.
    """

    def __init__(
        self,
        options: Sequence[Sampling],
        matchers: Sequence[RowMatcher | None],
        vocab_size: int,
        mask_rows: MaskRows,
    ) -> None:
        self._options = options
        self._vocab_size = vocab_size
        self._mask_rows = mask_rows
        self._constrained = [row for row, matcher in enumerate(matchers) if matcher]
        self._free = [row for row, matcher in enumerate(matchers) if not matcher]
        self._masks = TokenMasks([each for each in matchers if each], vocab_size)
        self._constrained_sampler = self._new_sampler(self._constrained, vocab_size)
        self._free_sampler = self._new_sampler(self._free, vocab_size)

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        """Sample a token for each row; see ``Sampler.__call__``.

        Computes the masks first, while the device may still compute the logits. The matchers must
        have consumed all tokens of their rows.
        """
        few: dict[int, list[int]] = {}
        many: dict[int, bytes] = {}
        for row, mask in zip(self._constrained, self._masks.compute(), strict=True):
            ids = few_ids(mask) if self._vocab_size >= _LARGE_VOCABULARY else None
            if ids is None:
                many[row] = mask
            else:
                few[row] = ids
        if len(many) == len(positions):
            return self._of_many(logits, positions, many)
        drawn: list[mx.array] = []
        if few:
            drawn.append(self._of_few(logits, positions, few))
        if self._free:
            own = [positions[row] for row in self._free]
            drawn.append(self._free_sampler(_rows(logits, self._free), own))
        if many:
            # As in `Sampler`: the arrays of large groups do not coexist.
            (given,) = mx.depends([logits], drawn[-1:])
            drawn.append(self._of_many(given, positions, many))
        order = [*few, *self._free, *many]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return mx.concatenate(drawn)[mx.array(inverse)]

    def _of_few(
        self, logits: mx.array, positions: Sequence[int], few: dict[int, list[int]]
    ) -> mx.array:
        # The width is always the same, so that a row's sums do not depend on the other rows.
        padded = array("I", (id_ for ids in few.values() for id_ in ids + [0] * (FEW - len(ids))))
        ids = mx.array(cast("Any", memoryview(padded))).reshape(len(few), FEW)
        counts = mx.array([len(each) for each in few.values()])
        own = logits[mx.array(list(few))[:, None], ids]
        own = mx.where(mx.arange(FEW) < counts[:, None], own, -mx.inf)
        sampler = self._new_sampler(list(few), FEW)
        return sampler(own, [positions[row] for row in few], ids)

    def _of_many(
        self, logits: mx.array, positions: Sequence[int], many: dict[int, bytes]
    ) -> mx.array:
        rows = list(many)
        masked = _rows(logits, rows) + self._mask_rows(list(many.values()), logits.dtype)
        sampler = self._constrained_sampler
        if rows != self._constrained:
            sampler = self._new_sampler(rows, self._vocab_size)
        return sampler(masked, [positions[row] for row in rows])

    def _new_sampler(self, rows: Sequence[int], size: int) -> Sampler:
        return Sampler([self._options[row] for row in rows], size)


def few_ids(mask: bytes) -> list[int] | None:
    """Return the tokens of a mask in order; None if there are more than ``FEW``."""
    if int.from_bytes(mask, "little").bit_count() > FEW:
        return None
    places = [found.start() for found in _NOT_EMPTY.finditer(mask)]
    return [8 * place + bit for place in places for bit in range(8) if mask[place] >> bit & 1]


def _rows(logits: mx.array, rows: Sequence[int]) -> mx.array:
    selection = rows_of(rows, len(logits))
    return logits if selection is None else logits[selection]
