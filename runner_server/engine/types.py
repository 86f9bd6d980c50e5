"""What passes between the servicer, the engine and the model adapter.

Plain frozen dataclasses: nothing of protobuf, nothing of MLX. Whoever holds one
may keep it on any thread.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

MAX_PARALLEL = 256
"""Most completions decoded together; the protocol states it."""


class State(enum.Enum):
    """What the engine is doing."""

    IDLE = "idle"
    LOADING = "loading"
    ACTIVE = "active"
    FAILED = "failed"
    STOPPING = "stopping"


class Dtype(enum.Enum):
    """In which format weights are held; see ``Dtype`` in the protocol."""

    AUTO = "auto"
    AS_STORED = "as_stored"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO_OR_STORED = "auto_or_stored"


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class LoadSpec:
    """A model to load.

    Attributes:
        model: A directory, or a hub id in the local cache.
        context_length: Longest sequence in tokens; None = the model's, at most 4,096.
        parallel: Completions decoded together.
        dtype: How to hold the weights.
        memory_limit_bytes: Most memory that MLX may hold; None = what all of it needs.
        prefix_cache_bytes: Most memory for evaluated prompts that are kept; 0 = none,
            None = one sequence, or a share of all of them.
        memory_override: Load it even if it does not fit.
        allow_inexact: Load it even if it cannot be computed exactly as its files say.
    """

    model: str
    context_length: int | None = None
    parallel: int = 4
    dtype: Dtype = Dtype.AUTO
    memory_limit_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    memory_override: bool = False
    allow_inexact: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model, as the protocol's ``Model`` describes it, with its limits.

    Attributes:
        max_context_length: The model's own limit, in tokens.
        context_length: The limit in force, in tokens.
        parallel: Completions decoded together.
        limit_bytes: The most memory that MLX may hold.
        prefix_cache_bytes: Of it, the most for evaluated prompts that are kept.
        kv_budget_bytes: Of it, the most for the KV caches of all running completions.
        reserved_bytes: The most that the whole process may take.
        dtype_fallback: Whether there was no memory for the format that is usual.
        warnings: Where its answers may differ from what its files say.
    """

    name: str
    path: str
    architecture: str
    max_context_length: int
    vocab_size: int
    weight_bytes: int
    dtype: str
    quantization_bits: int
    eos_token_ids: frozenset[int]
    context_length: int
    parallel: int
    limit_bytes: int
    prefix_cache_bytes: int = 0
    kv_budget_bytes: int = 0
    reserved_bytes: int = 0
    dtype_fallback: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see ``CompletionOptions`` in the protocol.

    Attributes:
        top_k: 0 = off.
        repeat_last_n: 0 = none, -1 = all.
        counts_output_only: Presence and frequency penalty look at all generated tokens and at no
            others, whatever ``repeat_last_n`` is; the repeat penalty looks where that says.
        seed: Any 64-bit number; the servicer draws one where the caller gave none.
        logit_bias: Pairs of token id and what is added to its logit.
        logprobs: How many likely tokens to report; None = no log probabilities.
    """

    temperature: float = 0.8
    top_p: float = 0.9
    min_p: float = 0.0
    top_k: int = 40
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    counts_output_only: bool = False
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class CompletionSpec:
    """A completion that has passed validation.

    Attributes:
        prompt_ids: At least one token, fewer than the context holds.
        max_tokens: Tokens to generate at most; with the prompt they fit the context.
        stop: Strings that end the text.
        stop_token_ids: Tokens that end the text as the model's own end does.
        ignore_eos: The model's own end does not end it.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, and the likeliest at its place (id, logprob).

    Attributes:
        text: What it added to the text, before stop strings are looked for; of those that the
            adapter reports, not told yet.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str = ""


@dataclass(frozen=True)
class Prefill:
    """The adapter evaluated a part of a row's prompt.

    Attributes:
        row: The row's id.
        evaluated: Tokens so far.
        total: Tokens of the prompt.
        cached: Of those evaluated, how many an earlier prompt had evaluated already.
    """

    row: int
    prefilled: int
    total: int
    cached: int = 0


@dataclass(frozen=True)
class Token:
    """The adapter generated a token of a row."""

    row: int
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class NotFinite:
    """The model's logits for the next token of a row are NaN or infinite; the row cannot go on."""

    row: int


Event = Prefill | Token | NotFinite
"""What a step of a batch reports."""


@dataclass(frozen=True)
class GenerationResult:
    """How a completion ended; durations in seconds.

    Attributes:
        prompt_count: Tokens of the prompt.
        cached_count: Of these, tokens that were not evaluated again.
    """

    reason: FinishReason
    stop_match: str
    prompt_count: int
    eval_count: int
    queue_seconds: float
    prompt_seconds: float
    eval_seconds: float
    cached_count: int = 0


@dataclass(frozen=True)
class GenerationStats:
    """What a completion has come to so far; durations in seconds, None for what has not begun.

    Attributes:
        cached_count: Of the prompt's tokens, those that were not evaluated again.
        queue_seconds: How long it has waited for a place.
        prompt_seconds: How long its prompt has been evaluated.
        eval_seconds: How long it has generated.
        reason: Why it ended; None if it goes on, or did not end by itself.
    """

    prompt_count: int
    cached_count: int
    eval_count: int
    queue_seconds: float
    prompt_seconds: float | None
    eval_seconds: float | None
    reason: FinishReason | None


@dataclass(frozen=True)
class OutputDelta:
    """What a stream has for its reader."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prefill: tuple[int, int] | None = None
    done: GenerationResult | None = None


@dataclass(frozen=True)
class MemoryCounters:
    """What MLX holds, in bytes; evaluated prompts that are kept count as active too."""

    active_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    prefix_cache_bytes: int = 0
    prefix_cache_limit_bytes: int = 0


@dataclass(frozen=True)
class Rank:
    """Another process that holds a part of the model.

    Attributes:
        host: The name of its machine.
        pid: Its process id there.
        device: The device that computes.
        memory: What MLX holds there.
        process_bytes: Its resident set.
        limit_bytes: The most its part may take; 0 while no model is loaded.
    """

    rank: int
    host: str
    pid: int
    device: str
    memory: MemoryCounters = field(default_factory=MemoryCounters)
    process_bytes: int = 0
    limit_bytes: int = 0


@dataclass(frozen=True)
class EngineState:
    """What the engine does, read without waiting for it.

    Attributes:
        progress: 0 to 100.
        last_progress_age: Seconds since it last moved; None when it has nothing to do.
    """

    state: State
    progress: int
    model: ModelInfo | None
    running_count: int
    queued_count: int
    step_count: int
    last_progress_age: float | None
    last_error: str
