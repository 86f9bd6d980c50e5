"""Plain data exchanged by the API, the engine and the MLX backend.

All are frozen dataclasses, independent of protobuf and MLX, which any thread may keep.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from runner_common.contract import DEFAULT_PARALLEL
from runner_server.chat.format import ChatFormat
from runner_server.engine.adapters import AdapterInfo, AdapterSpec
from runner_server.engine.embedding.types import Embedded, EmbeddingInfo
from runner_server.engine.logprobs import PromptLogprobs, TokenLogprob
from runner_server.engine.prefix_disk import DiskCounters


class State(enum.Enum):
    """State of the engine; see ``State`` in the protocol."""

    IDLE = "idle"
    LOADING = "loading"
    ACTIVE = "active"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPING = "stopping"


class Dtype(enum.Enum):
    """Format of the weights in memory; see ``Dtype`` in the protocol."""

    AUTO = "auto"
    AS_STORED = "as_stored"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO_OR_STORED = "auto_or_stored"


class FinishReason(enum.Enum):
    """Reason that a generation ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class LoadSpec:
    """A model to load.

    Attributes:
        model: A directory, or a hub id in the local cache.
        context_length: Longest sequence in tokens; None = the model's, at most 4,096.
        parallel: Most requests decoded together.
        dtype: Format of the weights in memory.
        memory_limit_bytes: Most memory that MLX may hold; None = as much as the model needs.
        prefix_cache_bytes: Byte budget of the prefix cache; 0 = none, None = one sequence, or a
            share of the memory of all sequences.
        memory_override: Load the model even if it does not fit.
        allow_inexact: Load the model even if it cannot be computed exactly as its files say.
        kv_bits: Bits of a number in the KV caches; 0 = the format of the weights.
        adapters: Adapters to load with the model.
        draft_model: A directory or hub id of the model that proposes tokens; empty for none.
    """

    model: str
    context_length: int | None = None
    parallel: int = DEFAULT_PARALLEL
    dtype: Dtype = Dtype.AUTO
    memory_limit_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    memory_override: bool = False
    allow_inexact: bool = False
    kv_bits: int = 0
    adapters: tuple[AdapterSpec, ...] = ()
    draft_model: str = ""


@dataclass(frozen=True)
class DraftInfo:
    """Description of a draft model; see ``DraftModel`` in the protocol.

    Attributes:
        context_length: The longest text that it reads, in tokens.
    """

    name: str
    path: str
    architecture: str
    weight_bytes: int
    context_length: int


@dataclass(frozen=True)
class ModelInfo:
    """Description of a loaded model and its limits; see ``Model`` in the protocol.

    Attributes:
        max_context_length: The model's own limit, in tokens.
        context_length: The limit in force, in tokens.
        parallel: Most requests decoded together.
        limit_bytes: Most memory that MLX may hold.
        prefix_cache_bytes: Part of the limit for the prefix cache.
        kv_budget_bytes: Part of the limit for the KV caches of all admitted requests.
        reserved_bytes: Most memory that the whole process may hold.
        dtype_fallback: Whether the weights are as stored because the usual format did not fit.
        warnings: Differences between the output and the model that the files describe.
        chat: The form of conversations.
        takes_constraints: Whether texts can be constrained; see ``LoadedModel.grammars``.
        completes: Whether the model has an output layer, without which it only embeds texts.
        embedding: Whether and how the model embeds texts.
        kv_bits: Bits of a number in the KV caches; 0 = the format of the weights.
        adapters: The adapters that requests may select.
        draft: The draft model; None without one.
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
    chat: ChatFormat = field(default_factory=ChatFormat)
    takes_constraints: bool = False
    completes: bool = True
    embedding: EmbeddingInfo = field(default_factory=EmbeddingInfo)
    kv_bits: int = 0
    adapters: tuple[AdapterInfo, ...] = ()
    draft: DraftInfo | None = None


TOOL_CALLS = "tool_calls"
"""Kind of a constraint of required calls: their form, the markers before and after them, and the
field, name and schema of each tool. No request has it."""


@dataclass(frozen=True)
class Constraint:
    """A rule that a text must obey; see ``Constraint`` in the protocol.

    Attributes:
        kind: One of ``CONSTRAINT_KINDS``, or ``TOOL_CALLS``.
        texts: The schema, expression or grammar; the texts of a choice; empty for any JSON object.
    """

    kind: str
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """Sampling options; see ``CompletionOptions`` in the protocol.

    Attributes:
        top_k: 0 = off.
        repeat_last_n: 0 = none, -1 = all.
        counts_output_only: Whether the presence and frequency penalties count all generated
            tokens and no prompt tokens. ``repeat_last_n`` then limits the repeat penalty only.
        seed: Any 64-bit number; the service draws one at random if the caller set none.
        logit_bias: Pairs of a token id and the number added to its logit.
        logprobs: Number of likely tokens to report; None = no log probabilities.
        min_predict: Number of first tokens that are none of ``end_ids``.
        end_ids: The tokens that end the text; empty if ``min_predict`` is 0.
        logprob_token_ids: Tokens to report with each generated one; ``logprobs`` is not None then.
        prompt_logprobs: Number of likely tokens to report with each token of the prompt; None = no
            log probabilities of the prompt.
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
    min_predict: int = 0
    end_ids: tuple[int, ...] = ()
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class CachePolicy:
    """Use of the prefix cache by a request.

    Attributes:
        reads: Whether the prompt may begin with a prefix from the cache.
        writes: Whether the tokens of the request are stored in the cache.
        salt: Only requests with the same salt share entries.
    """

    reads: bool = True
    writes: bool = True
    salt: str = ""


@dataclass(frozen=True)
class CompletionSpec:
    """A validated request.

    Attributes:
        prompt_ids: At least one token, and fewer than the context holds.
        max_tokens: Most tokens to generate; prompt and output fit the context.
        stop: Strings that end the text.
        stop_token_ids: Tokens that end the text, like the model's own end tokens.
        ignore_eos: Whether to continue after the model's own end tokens.
        request_id: The caller's name for the request, not necessarily unique; may be empty.
        priority: Higher first among waiting requests.
        cache_policy: Use of the prefix cache.
        adapter: Name of the adapter; empty for the model without one.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    request_id: str = ""
    priority: int = 0
    cache_policy: CachePolicy = field(default_factory=CachePolicy)
    adapter: str = ""


@dataclass(frozen=True)
class Prefill:
    """Event: part of a row's prompt was prefilled.

    Attributes:
        row: Id of the row.
        prefilled: Prompt tokens prefilled, cached ones included.
        total: Prompt tokens in total.
        cached: Prompt tokens taken from the prefix cache.
        logprobs: Log probabilities of the tokens after those prefilled now, if requested.
    """

    row: int
    prefilled: int
    total: int
    cached: int = 0
    logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class Token:
    """Event: a row generated a token, which may have been drafted."""

    row: int
    token_id: int
    logprob: TokenLogprob | None = None
    is_drafted: bool = False


@dataclass(frozen=True)
class NotFinite:
    """Event: the logits of a row's next token are NaN or infinite, so the row must end."""

    row: int


@dataclass(frozen=True)
class NoLegalToken:
    """Event: no token can continue a row's text within its constraint, so the row must end."""

    row: int
    reason: str


Failure = NotFinite | NoLegalToken
"""Event after which a row must end."""

Event = Prefill | Token | Embedded | Failure
"""Progress of one row, made by a work item."""


@dataclass(frozen=True)
class GenerationResult:
    """Outcome of a completed generation; durations in seconds.

    Attributes:
        prompt_count: Tokens of the prompt.
        cached_count: Prompt tokens taken from the prefix cache.
        is_satisfied: Whether the text obeys the constraint; None without one.
        drafted_count: Tokens drafted and checked.
        accepted_count: Generated tokens that were drafted.
    """

    reason: FinishReason
    stop_match: str
    prompt_count: int
    eval_count: int
    queue_seconds: float
    prompt_seconds: float
    eval_seconds: float
    cached_count: int = 0
    is_satisfied: bool | None = None
    drafted_count: int = 0
    accepted_count: int = 0


@dataclass(frozen=True)
class GenerationStats:
    """Usage and timing of a request up to now; durations in seconds.

    Attributes:
        cached_count: Prompt tokens taken from the prefix cache.
        queue_seconds: Time in the queue.
        prompt_seconds: Time from admission to the first token; None before admission.
        eval_seconds: Time since the first token; None before that token.
        reason: Finish reason; None if the request is unfinished, failed or was cancelled.
        drafted_count: Tokens drafted and checked.
        accepted_count: Generated tokens that were drafted.
    """

    prompt_count: int
    cached_count: int
    eval_count: int
    queue_seconds: float
    prompt_seconds: float | None
    eval_seconds: float | None
    reason: FinishReason | None
    drafted_count: int = 0
    accepted_count: int = 0


@dataclass(frozen=True)
class OutputDelta:
    """New output of a request; a merged delta may cover several tokens.

    Attributes:
        text: Whole characters; may lag behind the tokens.
        token_ids: The new tokens.
        logprobs: One entry for each new token, if requested.
        prefill: Prompt tokens prefilled so far, and prompt tokens in total.
        prompt_logprobs: Log probabilities of the next tokens of the prompt, if requested.
        done: The outcome; set in the last delta only.
        merged_texts: If the delta covers several tokens, the part of ``text`` that each released.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prefill: tuple[int, int] | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    done: GenerationResult | None = None
    merged_texts: tuple[str, ...] = ()

    @property
    def token_texts(self) -> tuple[str, ...]:
        """The part of ``text`` that each token released."""
        return self.merged_texts or (self.text,) * len(self.token_ids)


@dataclass(frozen=True)
class MemoryCounters:
    """Memory of MLX in bytes; the prefix cache is part of the active bytes.

    Attributes:
        disk: Counters of the prefix cache on disk; None without one.
    """

    active_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    prefix_cache_bytes: int = 0
    prefix_cache_limit_bytes: int = 0
    disk: DiskCounters | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes that MLX holds: in use, or kept for reuse."""
        return self.active_bytes + self.cache_bytes


@dataclass(frozen=True)
class Rank:
    """Another process with a part of the model.

    Attributes:
        rank: Number of the process in the group.
        host: Name of the machine.
        pid: Process id on that machine.
        device: Name of the device that computes.
        memory: Memory of MLX in the process.
        process_bytes: Resident set of the process.
        limit_bytes: Most memory that MLX may hold there; 0 while no model is loaded.
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
    """Snapshot of the engine.

    Attributes:
        progress: Progress of the load, 0 to 100.
        running_count: Admitted requests, preempted ones included.
        queued_count: Requests that wait for a slot.
        step_count: Work items run since the start.
        last_progress_age: Seconds since the last progress; None if the engine has no work.
        last_error: Text of the latest failed load or step; empty if none has failed.
        kv_token_count: Tokens in the KV caches of the admitted requests.
        kv_token_capacity: Most tokens that fit, in equally long sequences; 0 without a model.
        prefix_cached_ratio: Share of prompt tokens taken from the prefix cache in the last minute.
        tokens_per_second: Tokens generated per second in the last minute.
    """

    state: State
    progress: int
    model: ModelInfo | None
    running_count: int
    queued_count: int
    step_count: int
    last_progress_age: float | None
    last_error: str
    kv_token_count: int = 0
    kv_token_capacity: int = 0
    prefix_cached_ratio: float = 0.0
    tokens_per_second: float = 0.0
