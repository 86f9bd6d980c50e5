"""State, model and memory of a runner, and results of loads and drains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests a model and its server accept; None where an older server does not tell."""

    batched: bool | None = None
    """Whether several completions are decoded together; otherwise they run one after another."""
    prefix_cache: bool | None = None
    """Whether a prompt may reuse the prefill of an earlier one."""
    max_context_length: int | None = None
    """The longest sequence that is accepted, in tokens."""
    max_logprobs: int | None = None
    """The largest ``logprobs`` and ``prompt_logprobs`` of a completion."""
    max_stop_count: int | None = None
    """The most strings in ``Options.stop``."""
    max_logit_bias_count: int | None = None
    """The most token ids in ``Options.logit_bias``."""
    rank_count: int | None = None
    """The number of processes that together hold the model."""
    max_stop_token_id_count: int | None = None
    """The most ids in ``Options.stop_token_ids``."""
    max_logprob_token_id_count: int | None = None
    """The most ids in ``logprob_token_ids`` of a completion."""
    chat: bool | None = None
    """Whether the model has a chat template."""
    reasoning: bool | None = None
    """Whether answers to conversations have their reasoning apart."""
    tools: bool | None = None
    """Whether conversations may have tools."""
    constraint_kinds: tuple[str, ...] | None = None
    """The kinds of constraints: json_schema, json_object, regex, lark, choice. None if there are
    none, or if an older server does not tell."""
    required_tools: bool | None = None
    """Whether answers can be required to call tools."""
    completion: bool | None = None
    """Whether completions are accepted; False for a model that only embeds texts."""
    embedding_dimension: int | None = None
    """The number of values in a vector; 0 if the model does not embed texts."""
    max_embed_count: int | None = None
    """The most texts of a call of ``embed``; 0 if the model does not embed texts."""
    max_embed_tokens: int | None = None
    """The longest text of ``embed``, in tokens; 0 if the model does not embed texts."""


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A loaded draft model."""

    name: str
    """The directory's name."""
    path: str
    """The directory on the server's machine."""
    architecture: str
    """``model_type`` of its config.json."""
    weight_bytes: int
    """Memory taken by the weights, beside ``Model.weight_bytes``."""
    context_length: int
    """The longest sequence for which it guesses tokens."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model."""

    name: str
    """The directory's name, or the hub id."""
    path: str
    """The model's directory on the server's machine."""
    architecture: str
    """``model_type`` of its config.json."""
    context_length: int
    """The model's own limit on a sequence, in tokens. ``Status.context_length`` is the limit in
    force."""
    vocab_size: int
    """The number of token ids; valid ids are 0 to vocab_size - 1."""
    weight_bytes: int
    """Memory taken by the weights."""
    dtype: str
    """The format of the floating-point weights: float32, bfloat16 or float16."""
    quantization_bits: int
    """Bits per weight; 0 if the weights are not quantized in memory."""
    eos_token_ids: tuple[int, ...]
    """The token ids that end a text."""
    dtype_fallback: bool = False
    """Whether ``"auto_or_stored"`` had no memory for float32 and kept the weights as stored."""
    warnings: tuple[str, ...] = ()
    """Ways in which the output may deviate from the model's files, and known limitations."""
    capabilities: Capabilities = Capabilities()
    """What requests the model and its server accept."""
    kv_bits: int = 0
    """Bits of a number in the KV caches; 0 if they are not quantized."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """The directories of the adapters that requests may select, by name."""
    draft_model: DraftModel | None = None
    """The model that guesses its next tokens; None if there is none."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Result of a load."""

    model: Model
    """The loaded model."""
    load_seconds: float
    """Duration of the load on the server."""


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """Memory needed by a load on a runner's machine, in bytes, and whether the load fits now.

    The six parts come first. ``total_bytes`` is their sum and an upper bound on the peak
    memory of the whole process, with every sequence at full length.
    """

    weight_bytes: int
    """The weights in the format in which they would be held."""
    kv_bytes: int
    """KV caches and recurrent states of ``parallel`` sequences of ``context_length`` tokens. If
    the memory limit is too small for all of them, counts only as many as fit."""
    prefix_cache_bytes: int
    """The upper limit of the prefix cache."""
    working_bytes: int
    """Working memory: arrays of a prefill chunk or a decode step, the copy of a layer's cache
    while it grows, and the buffers that MLX keeps for reuse."""
    process_bytes: int
    """The process without the model: interpreter, libraries, tokenizer, heap."""
    load_transient_bytes: int
    """Memory needed only while the files are read, on top of the other parts."""
    total_bytes: int
    """The sum of the six parts."""
    required_bytes: int
    """Memory that a load asks for: the total, except for a prefix cache of the default size,
    which shrinks if memory is short."""
    available_bytes: int
    """Memory available now: free memory less ``overhead_bytes`` and ``reserved_bytes``, plus the
    memory that unloading the current model would free."""
    overhead_bytes: int
    """Memory kept free: the device's minimum plus the configured overhead."""
    reserved_bytes: int
    """Memory that other runners and pending loads on that machine may still use."""
    fits: bool
    """Whether ``required_bytes`` is at most ``available_bytes``."""
    dtype: str
    """The assumed format of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` or
    ``"as_stored"``."""
    context_length: int
    """The assumed length of a sequence, in tokens."""
    parallel: int
    """The assumed number of sequences."""
    notes: tuple[str, ...] = ()
    """Caveats of the estimate, and warnings that the loaded model would have; empty if none."""


class State(StrEnum):
    """State of a runner."""

    UNKNOWN = "unknown"
    """A state unknown to this version."""
    IDLE = "idle"
    """No model is loaded."""
    LOADING = "loading"
    """A load is running."""
    ACTIVE = "active"
    """A model is loaded and the runner accepts completions."""
    DRAINING = "draining"
    """A model is loaded and the runner refuses new completions, because of a ``drain``."""
    FAILED = "failed"
    """The engine is dead; the process is about to exit."""
    STOPPING = "stopping"
    """The process was asked to stop and is about to exit."""


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory of a runner, in bytes."""

    active_bytes: int
    """Memory of live arrays: weights, KV caches and the working memory of a step."""
    cache_bytes: int
    """Freed buffers that MLX keeps for reuse."""
    peak_bytes: int
    """The highest ``active_bytes`` since the last load began."""
    process_bytes: int
    """The resident set of the process."""
    limit_bytes: int
    """The upper limit of ``active_bytes`` plus ``cache_bytes``; 0 if no model is loaded."""
    prefix_cache_bytes: int = 0
    """The part of ``active_bytes`` held by the prefix cache."""
    other_bytes: int = 0
    """The part of ``process_bytes`` outside of MLX: interpreter, libraries, tokenizer, and pages
    that the heap has not returned. On CUDA all of ``process_bytes``."""
    reserved_bytes: int = 0
    """Memory reserved for the process on its machine, its upper limit; 0 if no model is loaded."""
    prefix_cache_limit_bytes: int = 0
    """The current upper limit of ``prefix_cache_bytes``; below the limit set at load time if free
    memory has run short since."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that together hold a model."""

    rank: int
    """Number of the rank; rank 0 serves."""
    host: str
    """Name of the rank's machine."""
    pid: int
    """Process id on that machine."""
    device: str
    """The device used for computation, as in ``Status.device``."""
    memory_usage: MemoryUsage
    """Memory of the process, at most two seconds old."""


@dataclass(frozen=True, slots=True)
class Status:
    """Snapshot of a runner: state, model, memory and queue."""

    state: State
    """The current state."""
    progress: int
    """Progress of the running load, 0 to 100; 100 if a model is loaded."""
    context_length: int
    """The longest sequence that is accepted, in tokens; 0 without a model."""
    memory_bytes: int
    """Memory held by MLX, active and cached."""
    memory_usage: MemoryUsage
    """The memory, broken down into parts."""
    model: Model | None
    """The loaded model; None without one."""
    parallel: int
    """The maximum number of completions decoded together; 0 without a model."""
    running_count: int
    """Completions in prefill or decode, or preempted because of a slow reader."""
    queued_count: int
    """Completions waiting in the queue."""
    step_count: int
    """Engine steps since the process started."""
    last_progress_age_seconds: float | None
    """Time since the engine last made progress; None if it is idle."""
    uptime_seconds: float
    """Time since the process started."""
    runner_id: str
    """Random id of the process; a new id means that the runner was restarted."""
    pid: int
    """Process id on the server's machine."""
    device: str
    """The device used for computation ("cpu: ...", "gpu: ..."); empty until MLX is imported."""
    server_version: str
    """Version of the server."""
    last_error: str
    """Message of the last load or step that failed; empty if none did."""
    blas: str = ""
    """The BLAS library used on a CPU; empty on other devices and until MLX is imported."""
    ranks: tuple[Rank, ...] = ()
    """The processes that together hold the model, rank 0 first; empty if one process holds all of
    it. All other attributes describe rank 0."""
    kv_token_count: int = 0
    """Tokens in the KV caches of completions that have started."""
    kv_token_capacity: int = 0
    """The maximum of ``kv_token_count`` if completions are equally long; 0 without a model."""
    prefix_cached_ratio: float = 0.0
    """The part of the prompt tokens taken from the prefix cache, 0 to 1, of completions that got
    their first token in the last minute; 0 without any."""
    tokens_per_second: float = 0.0
    """Tokens generated per second, by all completions together, in the last minute."""


@dataclass(frozen=True, slots=True)
class DrainResult:
    """Ends of the completions that a drain waited for."""

    finished_count: int
    """Completions that finished or failed, or that their clients cancelled."""
    aborted_count: int
    """Completions that were ended, with ``RequestAbortedError`` for their readers."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device used by a runner."""

    kind: str
    """``"cpu"`` or ``"gpu"``."""
    name: str
    """Name of the device, as the system reports it."""
    memory_bytes: int
    """Memory that MLX holds on the device for this runner."""
