"""Sampling of the next token of each row of a batch, grouped by strategy."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.arrays import rows_of
from runner_server.mlx_backend.sampling.strategies import StrategyChoice


class Sampler:
    """Samples one token for each row of a batch.

    Rows with the same strategy form one group, whatever their temperature, seed or penalties.

    Args:
        rows: The sampling options of each row.
        vocab_size: Number of token ids, or of logits of each row.
    """

    def __init__(self, rows: Sequence[Sampling], vocab_size: int) -> None:
        choices: dict[StrategyChoice, list[int]] = {}
        for index, sampling in enumerate(rows):
            choices.setdefault(StrategyChoice.of(sampling, vocab_size), []).append(index)
        groups = [
            (choice, indices[start : start + choice.rows_at_once])
            for choice, indices in choices.items()
            for start in range(0, len(indices), choice.rows_at_once)
        ]
        self._groups = [
            (indices, rows_of(indices, len(rows)), choice.strategy([rows[i] for i in indices]))
            for choice, indices in groups
        ]
        order = [index for _, indices in groups for index in indices]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self._inverse = mx.array(inverse) if len(groups) > 1 else None

    def __call__(
        self, logits: mx.array, positions: Sequence[int], ids: mx.array | None = None
    ) -> mx.array:
        """Sample a token for each row.

        Args:
            logits: Shape ``(rows, n)``.
            positions: Number of tokens already drawn in each row.
            ids: The ids of the logits, same shape, in order; None for those of the vocabulary.

        Returns:
            Token ids, shape ``(rows,)``.
        """
        drawn: list[mx.array] = []
        for indices, selection, strategy in self._groups:
            # `depends` evaluates the groups one after another, so that their arrays do not coexist.
            (given,) = mx.depends([logits], drawn[-1:]) if drawn else (logits,)
            own = [positions[index] for index in indices]
            if selection is None:
                drawn.append(strategy(given, own, ids))
            else:
                own_ids = None if ids is None else ids[selection]
                drawn.append(strategy(given[selection], own, own_ids))
        return drawn[0] if self._inverse is None else mx.concatenate(drawn)[self._inverse]
