"""Working memory of a model: the arrays of a prefill chunk or a decode step.

The model runs on unevaluated arrays of the sizes in question, and
:mod:`~runner_server.mlx_backend.planning.graph_memory` adds up the arrays that MLX would allocate.
Nothing is computed and no weights are read: a 28-layer model takes a fraction of a second.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from runner_common.contract import MAX_LOGPROBS
from runner_server.engine.types import Sampling
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.cache.quantized import QuantizedCache, fill, parts_of
from runner_server.mlx_backend.cache.row_caches import Caches, merge, side_by_side
from runner_server.mlx_backend.embedding.hidden import Body, find_body
from runner_server.mlx_backend.planning.graph_memory import transient_bytes
from runner_server.mlx_backend.sampling.end_mask import EndMask
from runner_server.mlx_backend.sampling.logprobs import token_logprobs
from runner_server.mlx_backend.sampling.mask_rows import expanded, mask_words
from runner_server.mlx_backend.sampling.penalties import Penalties
from runner_server.mlx_backend.sampling.prompt_logprobs import ChunkLogprobs
from runner_server.mlx_backend.sampling.sampler import Sampler
from runner_server.mlx_backend.upstream.names import KVCache, RotatingKVCache, make_prompt_cache

logger = logging.getLogger(__name__)

_GUESSED_VECTORS = 8

_ODD_ROWS = (13, 17)

_KNOWN_ALONE = {
    "afm7": "its key offset is that of the longest row, padding included",
    "minimax_m3_vl": "its sparse attention counts padding in texts with more tokens than it keeps",
    "recurrent_gemma": "it computes the first token of a text differently from the others",
}
"""Modules of mlx_lm that compute batches wrongly although a trace shows no error, with the reasons.

The trial after a load would find afm7, but an estimate runs no trial and would count all rows.
"""


class RowsApartError(Exception):
    """Rows of a model cannot be decoded together. The message gives the reason."""


_TRACED_TOKENS = 32
"""Number of tokens in a traced chunk with log probabilities."""

_FEW = 16
"""Number of tokens after which every cache has all of its arrays."""


def prefill_bytes(model: Module, chunk: int, tokens: int) -> int:
    """Return the bytes of working memory of a prompt's last chunk, without weights and caches.

    Args:
        model: A model with lazy weights.
        chunk: Number of tokens in the chunk.
        tokens: Number of tokens in the prompt, including the chunk.
    """
    chunk = min(chunk, tokens)
    caches = _filled(model, 1, tokens - chunk)
    return _traced(model, caches, 1, chunk, _evaluate_nothing)


def batch_prefill_bytes(model: Module, rows: int, chunk: int) -> int:
    """Return the bytes of working memory to prefill the first chunks of several prompts together.

    Args:
        model: A model with lazy weights.
        rows: Number of prompts.
        chunk: Number of tokens in each chunk.
    """
    one_by_one = [make_prompt_cache(model) for _ in range(rows)]
    caches = one_by_one[0]
    if rows > 1:
        caches = [side_by_side(layers) for layers in zip(*one_by_one, strict=True)]
    return _traced(model, caches, rows, chunk, _evaluate_nothing)


def text_bytes(model: Module, rows: int, chunk: int, tokens: int) -> int:
    """Return the bytes of working memory to embed the last chunks of texts, without the caches.

    Args:
        model: A model with lazy weights.
        rows: Number of texts.
        chunk: Number of tokens in each chunk.
        tokens: Number of tokens in each text, including the chunk.
    """
    body = find_body(model)
    if body is None:
        return 0
    chunk = min(chunk, tokens)

    def pool(states: mx.array, _inputs: mx.array) -> list[mx.array]:
        weights = mx.zeros(states.shape[:2])
        return [mx.sum(states.astype(mx.float32) * weights[..., None], axis=1)]

    # Texts that share a call have no caches.
    caches = _filled(model, 1, tokens - chunk) if rows == 1 else cast("Caches", None)
    return _traced(model, caches, rows, chunk, pool, body)


def decode_bytes(model: Module, rows: int, tokens: int) -> int:
    """Return the bytes of working memory of a decode step with sampling, without the caches.

    Args:
        model: A model with lazy weights.
        rows: Number of sequences decoded together.
        tokens: Number of tokens in each sequence.
    """

    def draw(logits: mx.array, inputs: mx.array) -> list[mx.array]:
        last = logits[:, -1, :]
        # The most expensive options: a sort of the whole vocabulary, penalties, bias, a constraint
        # and log probabilities. Without `top_k`, the sampler would have to read values, as Nucleus
        # does.
        options = [_costly(last.shape[-1])] * rows
        changed = Penalties(options)(last, [[0]] * rows, inputs[:, -1], [1] * rows)
        changed = EndMask(options)(changed, [0] * rows)
        masks = [bytes(4 * mask_words(last.shape[-1]))] * rows
        changed = changed + expanded(masks, last.shape[-1], changed.dtype)
        drawn = Sampler(options, last.shape[-1])(changed, [0] * rows)
        found = token_logprobs(last, drawn, min(MAX_LOGPROBS, last.shape[-1]))
        return [drawn, found.chosen, found.ids, found.values]

    return _traced(model, _filled(model, rows, tokens - 1), rows, 1, draw)


def logits_bytes(vocab_size: int) -> int:
    """Return the bytes of working memory per token of a chunk with log probabilities.

    These are the logits in 16 bits and in 32, and the arrays of the search for the likely tokens.
    """

    def find(hidden: mx.array, head: mx.array) -> list[mx.array]:
        logits = hidden @ head
        chunk = ChunkLogprobs(logits, [0] * _TRACED_TOKENS, min(MAX_LOGPROBS, vocab_size))
        return [*chunk.arrays]

    hidden = mx.zeros((_TRACED_TOKENS, 1), dtype=mx.bfloat16)
    head = mx.zeros((1, vocab_size), dtype=mx.bfloat16)
    return -(-transient_bytes(find, [hidden, head]) // _TRACED_TOKENS)


def _costly(vocab_size: int) -> Sampling:
    return Sampling(
        top_k=max(1, vocab_size - 1),
        top_p=0.5,
        min_p=0.01,
        repeat_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias=((0, 1.0),),
        logprobs=0,
        min_predict=1,
        end_ids=(0,),
    )


def require_batches(model: Module) -> None:
    """Check that a model can decode several sequences at once, by running it on lazy arrays.

    The numbers of rows are such that no model has as many heads. With equal numbers, a model could
    take a mask of rows for a mask of heads, and compute a wrong answer without an error.

    Args:
        model: A model with lazy weights.

    Raises:
        RowsApartError: The model cannot decode several sequences at once.
    """
    name = type(model).__module__.rpartition(".")[2]
    if name in _KNOWN_ALONE:
        raise RowsApartError(_KNOWN_ALONE[name])
    kinds = {type(cache) for cache in make_prompt_cache(model)}
    if unmerged := sorted(kind.__name__ for kind in kinds if not hasattr(kind, "merge")):
        raise RowsApartError(f"caches of kind {', '.join(unmerged)} cannot be batched")
    for rows in _ODD_ROWS:
        _require_runs(model, _filled(model, rows, 3), mx.zeros((rows, 1), dtype=mx.int32))


def _evaluate_nothing(_logits: mx.array, _inputs: mx.array) -> list[mx.array]:
    return []


def _filled(model: Module, rows: int, tokens: int) -> Caches:
    """Return unevaluated caches of ``rows`` rows, each with ``tokens`` tokens."""
    one = make_prompt_cache(model)
    if tokens > 0:
        few = min(tokens, _FEW)
        model(mx.zeros((1, few), dtype=mx.int32), cache=one)
        for cache in _leaves(one):
            _lengthen(cache, tokens)
    if rows == 1:
        return cast("Caches", one)
    return merge([copy.copy(one) for _ in range(rows)], rows)


def _leaves(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        parts = getattr(cache, "caches", None)
        if parts is None:
            yield cache
        else:
            yield from _leaves(parts)


def _lengthen(cache: Any, tokens: int) -> None:
    """Resize a cache as if ``tokens`` tokens had passed through the model.

    A recurrent state has its final size from the first token on. Running the model on a long
    context instead would build a large graph, for some models with one operation per token.
    """
    if type(cache) not in (KVCache, QuantizedCache, RotatingKVCache) or cache.keys is None:
        return
    if type(cache) is not RotatingKVCache:
        columns = -(-tokens // cache.step) * cache.step
    else:
        columns = min(tokens, cache.max_size)
        cache._idx = columns  # noqa: SLF001 - the index of the next write
    parts = tuple(
        mx.zeros((*part.shape[:2], columns, part.shape[3]), dtype=part.dtype)
        for part in parts_of(cache)
    )
    fill(cache, parts, tokens)


def _traced(
    model: Module,
    caches: Caches,
    rows: int,
    chunk: int,
    evaluated: Callable[[mx.array, mx.array], list[mx.array]],
    body: Body | None = None,
) -> int:
    """Return the transient bytes of a forward pass, or a guess if it cannot be traced.

    Args:
        model: A model with lazy weights, which are replaced during the trace and restored.
        caches: The caches of all rows.
        rows: Number of rows.
        chunk: Number of tokens in each row.
        evaluated: Returns the arrays to evaluate beside the caches, given the result and tokens.
        body: The part of the model to run; None for the whole model, whose result are logits.
    """
    weights = _named(model)
    held = list(_arrays(caches))

    def forward(tokens: mx.array, *inputs: mx.array) -> Sequence[mx.array]:
        _put(model, weights, inputs[: len(weights)])
        given = iter(inputs[len(weights) :])
        own = _rebuilt(caches, lambda _: next(given))
        result = (body or model)(tokens, cache=own)
        return [*evaluated(result, tokens), *_arrays(own)]

    tokens = mx.zeros((rows, chunk), dtype=mx.int32)
    try:
        return transient_bytes(forward, [tokens, *(value for _, value in weights), *held])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Some models read values in their forward pass, or compile parts of it.
        logger.info("this model cannot be traced (%s), so its working memory is estimated", error)
    finally:
        _put(model, weights, [value for _, value in weights])
    _require_runs(model, _rebuilt(caches, lambda array: array), tokens)
    return _guessed_bytes(model, rows * chunk)


def _require_runs(model: Module, caches: Caches, tokens: mx.array) -> None:
    """Check that a model runs on the given tokens and caches.

    Raises:
        RowsApartError: The model fails on several rows of different lengths.
        ModelUnsupported: The model fails on one row.
    """
    try:
        model(tokens, cache=caches)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if tokens.shape[0] > 1:
            raise RowsApartError(f"{type(error).__name__}: {error}") from error
        raise ModelUnsupported(
            f"this model cannot be run ({type(error).__name__}: {error})"
        ) from error


def _guessed_bytes(model: Module, tokens: int) -> int:
    """Return a generous guess: eight vectors of the widest layer for each token."""
    widest = max(
        (max(value.shape) for _, value in _named(model) if value.ndim > 1),
        default=0,
    )
    return tokens * widest * 4 * _GUESSED_VECTORS


def _named(model: Module) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))


def _put(model: Module, named: Sequence[tuple[str, mx.array]], values: Sequence[mx.array]) -> None:
    pairs = [(name, value) for (name, _), value in zip(named, values, strict=True)]
    model.update(cast("Any", tree_unflatten(pairs)))


def _arrays(value: Any) -> Iterator[mx.array]:
    """Yield the arrays of caches, in the order of :func:`_rebuilt`."""
    found: list[mx.array] = []

    def note(array: mx.array) -> mx.array:
        found.append(array)
        return array

    _rebuilt(value, note)
    yield from found


def _rebuilt(value: Any, replace: Callable[[mx.array], mx.array]) -> Any:
    """Copy nested lists, tuples, dictionaries and cache objects, replacing the arrays inside."""
    if isinstance(value, mx.array):
        return replace(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_rebuilt(part, replace) for part in value])
    if isinstance(value, dict):
        return {key: _rebuilt(part, replace) for key, part in value.items()}
    if hasattr(value, "__dict__") and not callable(value):
        clone = copy.copy(value)
        vars(clone).update({key: _rebuilt(part, replace) for key, part in vars(value).items()})
        return clone
    return value
