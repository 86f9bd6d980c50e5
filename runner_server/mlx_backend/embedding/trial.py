"""Trial of the vectors of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.model_directory import EmbeddingFiles
from runner_server.engine.embedding.types import Embedded
from runner_server.engine.work import TextChunk
from runner_server.mlx_backend.cache.row_caches import Caches
from runner_server.mlx_backend.embedding.hidden import find_body, why_not_hidden
from runner_server.mlx_backend.embedding.texts import TextModel, TextRows
from runner_server.mlx_backend.stream_errors import recover

_LENGTHS = (6, 4)
"""Numbers of tokens of the texts that are tried together and alone."""


@dataclass(frozen=True)
class TextTrial:
    """Result of the trial of a model.

    Attributes:
        model: Computes the vectors; None if there is a problem.
        dimension: Numbers in a vector.
        can_join: Whether several texts may be evaluated in one call.
        problem: Why the model does not embed; empty if it does.
    """

    model: TextModel | None = None
    dimension: int = 0
    can_join: bool = False
    problem: str = ""


def try_texts(
    model: Module,
    new_caches: Callable[[], Caches],
    files: EmbeddingFiles,
    *,
    vocab_size: int,
    tolerance: float,
) -> TextTrial:
    """Find out whether and how a model embeds texts.

    Args:
        model: The model, with its weights in memory.
        new_caches: Creates empty caches of the model.
        files: How the model's files say that it embeds.
        vocab_size: Number of token ids.
        tolerance: Largest difference that rounding explains, in standard deviations of a vector.
    """
    if files.problem:
        return TextTrial(problem=files.problem)
    ids = [(2 * index + 1) * vocab_size // 20 for index in range(sum(_LENGTHS))]
    body = find_body(model)
    if body is None:
        return TextTrial(problem=_unknown("it has no base model"))
    texts = [ids[: _LENGTHS[0]], ids[_LENGTHS[0] :]]
    # Few tokens, because each takes several arrays of the size of the vocabulary.
    if why := why_not_hidden(model, body, new_caches, texts[1]):
        return TextTrial(problem=_unknown(why))
    text_model = TextModel(body, new_caches, files.pooling, files.normalizes)
    alone = [vector for text in texts for vector in _vectors(text_model, [text])]
    if len(alone) < len(texts):
        return TextTrial(problem="the vector of a text is not finite (NaN or infinity)")
    size = alone[0].size // len(files.pooling)
    if files.dimension not in (None, size):
        return TextTrial(
            problem=f"1_Pooling/config.json says that hidden states have {files.dimension} "
            f"numbers, and this model's have {size}"
        )
    can_join = _is_same_together(text_model, texts, alone, tolerance)
    return TextTrial(text_model, alone[0].size, can_join)


def _unknown(why: str) -> str:
    return f"the final hidden states of this architecture are not known in mlx_lm: {why}"


def _is_same_together(
    model: TextModel,
    texts: Sequence[Sequence[int]],
    alone: Sequence[mx.array],
    tolerance: float,
) -> bool:
    try:
        together = _vectors(model, texts)
    except Exception:  # noqa: BLE001 - one text alone works, so the batch is at fault
        recover()
        return False
    if len(together) < len(alone):
        return False
    differences = [
        cast("float", (mx.max(mx.abs(one - other)) / mx.maximum(mx.std(one), 1e-9)).item())
        for one, other in zip(alone, together, strict=True)
    ]
    return max(differences) <= tolerance


def _vectors(model: TextModel, texts: Sequence[Sequence[int]]) -> list[mx.array]:
    rows = TextRows(model)
    rows.add(0, texts)
    chunks = [TextChunk(0, i, len(text), is_last=True) for i, text in enumerate(texts)]
    events = rows.run(chunks)
    found = [event.vector.tolist() for event in events if isinstance(event, Embedded)]
    return [mx.array(vector) for vector in found]
