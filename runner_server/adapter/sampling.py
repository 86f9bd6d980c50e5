"""Draws tokens: bias, penalties, top-k, temperature, top-p, min-p, keyed noise.

Every draw uses a key made of the request's seed and the token's position, never
MLX's global state, which is per thread and which an exception can poison. The
noise belongs to token ids, not to places among the candidates, so that the
rounding differences between a batch and a single row do not move it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from runner_server.messages import Sampling, TokenLogprob

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]

_MASK = (1 << 64) - 1

_MIN_TOP_P = 1e-9
"""Devices may take a number much smaller for 0, and then nothing would be kept."""

_MIN_TEMPERATURE = 1e-9
"""Below it a quotient could leave float32; any two logits that differ are far apart by then."""


def greedy(logits: mx.array) -> mx.array:
    """Takes the most likely token; [rows, vocabulary] -> [rows].

    Rows that share this very function are sampled in one call.
    """
    return mx.argmax(logits, axis=-1)


def draw(logits: mx.array, sampling: Sampling, key: mx.array) -> mx.array:
    """Draws one token for each row; [rows, vocabulary] -> [rows].

    Adding Gumbel noise and taking the maximum draws from the softmax (Gumbel-max,
    https://arxiv.org/abs/1611.01144).
    """
    noise = mx.random.gumbel(logits.shape, key=key)
    k = sampling.top_k
    ids = None
    if 0 < k < logits.shape[-1]:
        ids = mx.argpartition(logits, kth=-k, axis=-1)[..., -k:]
        logits = mx.take_along_axis(logits, ids, axis=-1)
        noise = mx.take_along_axis(noise, ids, axis=-1)
    logits = logits.astype(mx.float32)
    logits = logits - mx.max(logits, axis=-1, keepdims=True)
    logits = logits / max(sampling.temperature, _MIN_TEMPERATURE)
    if sampling.top_p < 1:
        logits = _keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        floor = mx.max(logits, axis=-1, keepdims=True) + mx.log(mx.array(sampling.min_p))
        logits = mx.where(logits < floor, -mx.inf, logits)
    choice = mx.argmax(logits + noise, axis=-1)
    if ids is None:
        return choice
    return mx.take_along_axis(ids, choice[..., None], axis=-1).squeeze(-1)


def _keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    ordered = -mx.sort(-logits, axis=-1)
    probs = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probs, axis=-1) - probs
    # The first candidate has nothing before it, so one always stays.
    kept = mx.where(before < max(top_p, _MIN_TOP_P), ordered, mx.inf)
    return mx.where(logits < mx.min(kept, axis=-1, keepdims=True), -mx.inf, logits)


def position_key(seed: int, position: int) -> mx.array:
    """The key of one draw: splitmix64 of seed and position.

    See https://prng.di.unimi.it/splitmix64.c for the mixing function.
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return mx.random.key(z ^ (z >> 31))


def processors(sampling: Sampling) -> list[Processor]:
    """What changes a row's logits before the draw, in the protocol's order."""
    steps: list[Processor] = []
    if sampling.logit_bias:
        steps.append(_bias(sampling.logit_bias))
    plain = (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.repeat_last_n != 0 and plain != (1.0, 0.0, 0.0):
        steps.append(lambda tokens, logits: _penalize(tokens, logits, sampling))
    return steps


def _bias(pairs: tuple[tuple[int, float], ...]) -> Processor:
    ids = mx.array([token_id for token_id, _ in pairs])
    values = mx.array([value for _, value in pairs], dtype=mx.float32)
    return lambda _tokens, logits: logits.at[:, ids].add(values.astype(logits.dtype))


def _penalize(tokens: mx.array, logits: mx.array, sampling: Sampling) -> mx.array:
    window = tokens if sampling.repeat_last_n < 0 else tokens[-sampling.repeat_last_n :]
    # float32, because bfloat16 cannot count past 256.
    logits = logits.astype(mx.float32)
    counts = mx.zeros(logits.shape[-1:]).at[window].add(1)
    seen = counts > 0
    divided = mx.where(
        logits > 0, logits / sampling.repeat_penalty, logits * sampling.repeat_penalty
    )
    logits = mx.where(seen, divided, logits)
    return logits - seen * sampling.presence_penalty - counts * sampling.frequency_penalty


class RowSampler:
    """Samples one row and, if asked, remembers how likely its tokens were.

    Args:
        sampling: The row's options.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._position = 0
        self._raw: mx.array | None = None
        self._recorded: deque[tuple[mx.array, ...]] = deque()

    def capture(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        """A processor that keeps the logits as the model gave them."""
        self._raw = logits
        return logits

    def __call__(self, logits: mx.array) -> mx.array:
        """Draws the next token; [1, vocabulary] -> [1]."""
        if self._sampling.temperature == 0:
            token = greedy(logits)
        else:
            key = position_key(self._sampling.seed, self._position)
            token = draw(logits, self._sampling, key)
        self._position += 1
        if self._sampling.logprobs is not None and self._raw is not None:
            self._recorded.append(_likelihoods(self._raw, token, self._sampling.logprobs))
            # Computed along with the step: asked for later, it would wait for the
            # step after it.
            mx.async_eval(self._recorded[-1])
        return token

    def next_logprob(self, token_id: int) -> TokenLogprob:
        """The likelihood of the oldest token that was drawn and not yet asked for."""
        chosen, ids, values = self._recorded.popleft()
        # MLX types these as what any array might hold.
        pairs = zip(
            cast("list[int]", ids.tolist()), cast("list[float]", values.tolist()), strict=True
        )
        return TokenLogprob(token_id, min(0.0, cast("float", chosen.item())), tuple(pairs))


def _likelihoods(logits: mx.array, token: mx.array, top: int) -> tuple[mx.array, ...]:
    row = logits[0].astype(mx.float32)
    logprobs = row - mx.logsumexp(row)
    if not top:
        return logprobs[token[0]], mx.array([], dtype=mx.int32), mx.array([])
    ids = mx.argpartition(logprobs, kth=-top)[-top:]
    ids = ids[mx.argsort(-logprobs[ids])]
    return logprobs[token[0]], ids, mx.minimum(logprobs[ids], 0.0)
