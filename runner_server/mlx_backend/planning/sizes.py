"""Sizes of a model with unread weights, as numbers. Imports no MLX.

:mod:`runner_server.mlx_backend.planning.measure` determines them, and
:mod:`runner_server.mlx_backend.planning.plan` decides by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runner_server.mlx_backend.planning.tokenizer_memory import TokenizerMemory


@dataclass(frozen=True)
class CacheShape:
    """Memory of one layer's cache as a function of the sequence length.

    Attributes:
        token_bytes: Bytes of one token.
        step: Number of tokens by which the cache grows.
        window: Most tokens in the cache; None for the whole sequence.
        fixed_bytes: Bytes that do not depend on the length, such as a recurrent state.
    """

    token_bytes: int = 0
    step: int = 1
    window: int | None = None
    fixed_bytes: int = 0

    def held_bytes(self, tokens: int) -> int:
        """Return the bytes of one sequence of ``tokens``."""
        held = -(-tokens // self.step) * self.step
        if self.window:
            held = min(held, self.window)
        return held * self.token_bytes + self.fixed_bytes


@dataclass(frozen=True)
class Probe:
    """Sizes found by passing one token through a model with lazy weights. Holds no arrays.

    Attributes:
        vocab_size: Number of token ids scored by the output layer.
        caches: The shapes of the layers' caches.
    """

    vocab_size: int
    caches: tuple[CacheShape, ...]

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of every layer's cache for one sequence."""
        return sum(cache.held_bytes(tokens) for cache in self.caches)

    def largest_layer_bytes(self, tokens: int) -> int:
        """Return the bytes of the largest layer's cache for one sequence."""
        return max((cache.held_bytes(tokens) for cache in self.caches), default=0)

    @property
    def step_bytes(self) -> int:
        """Bytes by which one sequence's caches grow in one step."""
        return sum(cache.step * cache.token_bytes for cache in self.caches)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model for one context length and number of sequences.

    Plans do not keep it, because ``decode_bytes`` keeps the model.

    Attributes:
        device: Kind of the device, ``"cpu"`` or ``"gpu"``.
        context_length: Longest sequence, in tokens.
        probe: The shapes of the model's caches.
        weight_bytes: The weights, in the dtypes they will have in memory.
        chunk: Most tokens in a prefill chunk.
        chunks_together: Most prefill chunks computed in one call.
        prefill_bytes: Working memory of the last chunk of a prompt of ``context_length``.
        together_bytes: Working memory of ``chunks_together`` first chunks in one call.
        logits_bytes: Working memory per token of a chunk whose log probabilities are computed, in
            addition to that of prefill.
        decode_bytes: Function from a number of sequences of ``context_length`` to the working
            memory of a decode step. Not computed before it is called.
        mask_bytes: Rows of token masks that are kept while a request has a constraint.
        load_transient_bytes: Peak of reading the weight files, in addition to the weights.
        tokenizer: The memory of the tokenizer.
        process_bytes: Interpreter, libraries and heap, without the tokenizer.
    """

    device: str
    context_length: int
    probe: Probe
    weight_bytes: int
    chunk: int
    chunks_together: int
    prefill_bytes: int
    together_bytes: int
    logits_bytes: int
    decode_bytes: Callable[[int], int]
    mask_bytes: int
    load_transient_bytes: int
    tokenizer: TokenizerMemory
    process_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the KV caches of one sequence of ``context_length``."""
        return self.probe.kv_bytes(self.context_length)

    @property
    def token_bytes(self) -> float:
        """Bytes of working memory per token of a prefill chunk."""
        return self.together_bytes / (self.chunks_together * self.chunk)

    @property
    def pair_bytes(self) -> float:
        """Bytes of working memory per pair of a token and a token that it attends to."""
        return max(0.0, self.prefill_bytes / self.chunk - self.token_bytes) / self.context_length
