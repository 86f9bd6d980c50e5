"""What the library takes and gives: frozen dataclasses, with no protobuf in them.

The proto file is the reference of what each field means. Here spans are float
seconds, an absent value is None, and an enum value that a newer server sends
becomes ``UNKNOWN``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from runner_client.settings import RestartPolicy as RestartPolicy  # noqa: PLC0414 - users have it from here
from runner_client.settings import Timeouts as Timeouts  # noqa: PLC0414 - the same
from runner_client.settings import TlsFiles as TlsFiles  # noqa: PLC0414 - the same

if TYPE_CHECKING:
    import builtins
    from collections.abc import Mapping

Dtype = Literal["auto", "auto_or_stored", "as_stored", "float32", "bfloat16", "float16"]
"""The number format of the weights in memory.

``"auto"`` is float32 on a CPU, the only fast format there, and as stored elsewhere.
``"auto_or_stored"`` is the same where that fits, else as stored, which is many times slower
on a CPU; ``Model.dtype_fallback`` says whether it came to that.
"""


class State(StrEnum):
    """What a runner is doing."""

    UNKNOWN = "unknown"
    """A state this version does not know."""
    IDLE = "idle"
    """No model is loaded."""
    LOADING = "loading"
    """A load runs."""
    ACTIVE = "active"
    """A model is loaded and completions are answered."""
    FAILED = "failed"
    """The engine is dead; the process is about to exit."""
    STOPPING = "stopping"
    """The process was asked to stop and drains."""


class DoneReason(StrEnum):
    """Why a completion ended."""

    UNKNOWN = "unknown"
    """A reason this version does not know."""
    STOP = "stop"
    """The model ended the text, or a stop string was found."""
    LENGTH = "length"
    """``num_predict`` tokens were generated, or the context is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How tokens are chosen and when to stop. None is the server's default."""

    temperature: float | None = None
    """0 takes the most likely token. 0 to 100; default 0.8."""
    top_p: float | None = None
    """Above 0 to 1; 1 is off; default 0.9."""
    min_p: float | None = None
    """0 to 1; 0 is off; default 0."""
    top_k: int | None = None
    """0 to the size of the vocabulary; 0 is off; default 40."""
    repeat_last_n: int | None = None
    """How many of the last tokens, prompt and generated, the penalties look at; -1 is all;
    default 64."""
    repeat_penalty: float | None = None
    """0.01 to 100; 1 is off; default 1."""
    presence_penalty: float | None = None
    """-100 to 100; default 0."""
    frequency_penalty: float | None = None
    """-100 to 100; default 0."""
    num_predict: int | None = None
    """The most tokens to generate; default: to the end of the context."""
    seed: int | None = None
    """The same seed gives the same text; default: random."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""

    def __post_init__(self) -> None:
        # A string is a sequence of strings too: each of its letters would end the text.
        stop: object = self.stop
        if isinstance(stop, str):
            raise TypeError(f"stop is a sequence of strings: write stop=({stop!r},)")


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model."""

    name: str
    """The directory's name, or the hub id."""
    path: str
    """The directory it was read from, as the server names it."""
    architecture: str
    """``model_type`` of its config.json."""
    context_length: int
    """The model's own limit on a sequence, in tokens."""
    vocab_size: int
    """Valid token ids are 0 to vocab_size - 1."""
    weight_bytes: int
    """What the weights take in memory."""
    dtype: str
    """The format of its floating-point weights: float32, bfloat16 or float16."""
    quantization_bits: int
    """Bits per weight; 0 if the weights are not held quantized."""
    eos_token_ids: tuple[int, ...]
    """The token ids that end a text."""
    dtype_fallback: bool = False
    """Whether ``"auto_or_stored"`` found no memory for float32 and holds the weights as
    stored."""
    warnings: tuple[str, ...] = ()
    """Where its answers may differ from what its files say."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A finished load."""

    model: Model
    """The model that is now loaded."""
    load_seconds: float
    """How long the server took."""


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """The memory of a runner, in bytes."""

    active_bytes: int
    """Held by live arrays: weights, KV caches, what a step computes."""
    cache_bytes: int
    """Freed, and kept by MLX for the next arrays."""
    peak_bytes: int
    """The highest ``active_bytes`` since the last load began."""
    process_bytes: int
    """The resident set of the process."""
    limit_bytes: int
    """The most that ``active_bytes`` and ``cache_bytes`` together may come to; 0 when no
    model is loaded."""
    prefix_cache_bytes: int = 0
    """Of ``active_bytes``: evaluated prompts kept for others that begin alike."""
    other_bytes: int = 0
    """Of ``process_bytes``: what MLX does not hold. Interpreter, libraries, tokenizer, and
    pages that the heap has not given back; on CUDA all of ``process_bytes``."""
    reserved_bytes: int = 0
    """The most the process may come to take, set aside for it on its machine; 0 when no
    model is loaded."""
    prefix_cache_limit_bytes: int = 0
    """The most ``prefix_cache_bytes`` may come to now; less than at the load after free
    memory has run short."""


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """What a load would need on a runner's machine, in bytes, and whether it fits now.

    The six parts come first; ``total_bytes`` is their sum, and an upper bound for the peak
    of the whole process, with every sequence at its full length.
    """

    weight_bytes: int
    """The weights as they will be held."""
    kv_bytes: int
    """KV caches and recurrent states of ``parallel`` sequences of ``context_length``; with
    a memory limit that is too small for all of them, of as many as fit."""
    prefix_cache_bytes: int
    """The most that evaluated prompts may take."""
    working_bytes: int
    """Arrays of a prefill chunk or a decode step, the copy of a layer's cache while it
    grows, the buffers that MLX keeps for reuse."""
    process_bytes: int
    """The process itself: interpreter, libraries, tokenizer, heap."""
    load_transient_bytes: int
    """What reading the files takes beyond all of the above."""
    total_bytes: int
    """The sum of the six parts."""
    required_bytes: int
    """What a load asks for: the total, without a prefix cache of the default size, which
    is made smaller where memory is short."""
    available_bytes: int
    """What may be taken now: free memory less ``overhead_bytes`` and ``reserved_bytes``,
    plus what the model that is loaded there would give back."""
    overhead_bytes: int
    """Kept free: the device's minimum and the configured overhead."""
    reserved_bytes: int
    """What other runners of that machine may still take, and loads under way."""
    fits: bool
    """Whether ``required_bytes`` is at most ``available_bytes``."""
    dtype: str
    """The format of the weights that was counted: ``"float32"``, ``"bfloat16"``,
    ``"float16"`` or ``"as_stored"``."""
    context_length: int
    """Tokens of one sequence that were counted."""
    parallel: int
    """Sequences that were counted."""
    notes: tuple[str, ...] = ()
    """What could not be told, in words; empty if everything could."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that hold a model together."""

    rank: int
    """Its number: 0 for the one that serves."""
    host: str
    """The name of its machine."""
    pid: int
    """Its process id there."""
    device: str
    """The device that computes, as ``Status.device``."""
    memory_usage: MemoryUsage
    """Its memory, at most two seconds old."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a runner does and holds."""

    state: State
    """What it is doing."""
    progress: int
    """Of the load that runs, 0 to 100; 100 when a model is loaded."""
    context_length: int
    """The longest sequence accepted, in tokens; 0 without a model."""
    memory_bytes: int
    """What MLX holds: active and cache."""
    memory_usage: MemoryUsage
    """The same in parts."""
    model: Model | None
    """The loaded model."""
    parallel: int
    """How many completions are decoded together."""
    running_count: int
    """Completions in prefill or decode."""
    queued_count: int
    """Completions that wait for a place."""
    step_count: int
    """Engine steps since the process started."""
    last_progress_age_seconds: float | None
    """How long ago the engine last moved; None when it has nothing to do."""
    uptime_seconds: float
    """How long the process has been up."""
    runner_id: str
    """Random per process: a new one means that it was restarted."""
    pid: int
    """Its process id, as the server's machine numbers it."""
    device: str
    """The device that computes ("cpu: ...", "gpu: ..."); empty until MLX is imported."""
    server_version: str
    """The version of the server."""
    last_error: str
    """The last load or step that failed, in words; empty when none did."""
    blas: str = ""
    """The library that multiplies matrices on a CPU; empty on other devices and until
    MLX is imported."""
    ranks: tuple[Rank, ...] = ()
    """The processes that hold the model together, rank 0 first; empty for one that holds it
    alone. What else stands here is of rank 0."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device that a runner computes on."""

    kind: str
    """``"cpu"`` or ``"gpu"``."""
    name: str
    """As the system calls it."""
    memory_bytes: int
    """What this runner's MLX holds there."""


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far the evaluation of a prompt is."""

    evaluated_count: int
    """Tokens evaluated so far."""
    total_count: int
    """Tokens of the prompt."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A likely token."""

    token_id: int
    """Its id."""
    text: str
    """What it would have added to the text, as ``TokenLogprob.text``."""
    logprob: float
    """The natural logarithm of its probability; at most 0."""
    bytes: builtins.bytes = b""
    """Its own bytes, which may be a part of a character."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, with its likelihood before any sampling option."""

    token_id: int
    """Its id."""
    text: str
    """What it adds to the text: all entries joined give the content, and then the stop string
    that was found and what its last token has behind it. Whole characters only: one that is
    spread over several tokens is the text of the one that completes it. Empty for a token that
    ends the text."""
    logprob: float
    """The natural logarithm of its probability; at most 0."""
    top: tuple[TopLogprob, ...]
    """The most likely tokens at its place, most likely first."""
    bytes: builtins.bytes = b""
    """Its own bytes, which may be a part of a character: all entries joined are the same text in
    UTF-8, from where the prompt ends."""


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of a completion. The counts and spans are set in the last one only."""

    content: str = ""
    """The next piece of text, whole characters only."""
    token_ids: tuple[int, ...] = ()
    """The tokens generated since the last chunk; their text may come a chunk later."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``token_ids``, if asked for."""
    done: bool = False
    """True in the last chunk, and only there."""
    done_reason: DoneReason | None = None
    """Why it ended; None before the last chunk."""
    stop_match: str | None = None
    """The stop string that ended it, if one did."""
    prompt_progress: PromptProgress | None = None
    """How far the evaluation of the prompt is; None after it."""
    prompt_eval_count: int = 0
    """Tokens of the prompt."""
    prompt_eval_seconds: float = 0.0
    """From the start of the prompt's evaluation to the first token."""
    eval_count: int = 0
    """Tokens generated."""
    eval_seconds: float = 0.0
    """From the first token to the last."""
    queue_seconds: float = 0.0
    """How long the request waited for a place."""
    prompt_cached_count: int = 0
    """Of ``prompt_eval_count``: tokens that were not evaluated again."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion: all chunks of a stream joined."""

    content: str
    """The whole text."""
    token_ids: tuple[int, ...]
    """All generated tokens, the one that ended the text included."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each of ``token_ids``, if asked for."""
    done_reason: DoneReason
    """Why it ended."""
    stop_match: str | None
    """The stop string that ended it, if one did."""
    prompt_eval_count: int
    """Tokens of the prompt."""
    prompt_eval_seconds: float
    """From the start of the prompt's evaluation to the first token."""
    eval_count: int
    """Tokens generated."""
    eval_seconds: float
    """From the first token to the last."""
    queue_seconds: float
    """How long the request waited for a place."""
    prompt_cached_count: int = 0
    """Of ``prompt_eval_count``: tokens that an earlier prompt had evaluated already and
    that were not evaluated again."""
